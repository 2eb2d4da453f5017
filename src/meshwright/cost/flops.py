"""Model FLOPs: the arithmetic that the model needs, whatever the layout does to it."""

from __future__ import annotations

from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters, layer_parameters


def model_flops_per_token(model: Model, seq: int) -> float:
    """Training FLOPs a token: 6 for every parameter that multiplies, and 12 x layers x heads x head_dim x seq for attention.

    The convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), used by Megatron-LM and llm-foundry: it
    counts attention over the full square, though a causal model computes half of it. Lookup tables multiply nothing; a tied
    table counts as the head. Experts that a token does not visit are left out.
    """
    counts = count_parameters(model)
    multiplying = counts.active - counts.embedding + (model.vocab * model.hidden if model.tied else 0)
    value_dim = model.latent.value_dim if model.latent else model.head_dim
    key_dim = model.latent.nope_dim + model.latent.rope_dim if model.latent else model.head_dim
    width = model.heads * (key_dim + value_dim) / 2
    spans = [min(model.window(i) or seq, seq) for i in range(model.layers)]
    return 6.0 * multiplying + 12.0 * width * sum(spans)


def recomputed_flops_per_token(model: Model, seq: int) -> float:
    """What full recompute adds, by the same convention: the layers' forward, but for the last product of each.

    Backward needs that product's input, not its output, and the head is not recomputed (`cost/program.py`).
    """
    layers = [p for i in range(model.layers) for p in layer_parameters(model, i) if ".mlp.down." not in p.name]
    spans = [min(model.window(i) or seq, seq) for i in range(model.layers)]
    return 2.0 * sum(p.numel for p in layers) + 4.0 * model.heads * model.head_dim * sum(spans)
