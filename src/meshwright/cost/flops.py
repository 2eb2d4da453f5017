"""Model FLOPs: the arithmetic that the model needs, whatever the layout does to it."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.cost.ops import Attention, Gemm, Op, Under
from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters


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


def recomputed_flops(ops: Iterable[Op], fullest_rank: float = 1.0) -> float:
    """Of forward operators that run again, by the same convention: attention counts over the full square. Of experts' products the
    mean over ranks: `ops` are those of one that gets `fullest_rank` times it."""
    total = 0.0
    for op in ops:
        for work in op.work if isinstance(op, Under) else (op,):
            if isinstance(work, Gemm):
                total += work.flops / (fullest_rank if work.role.place == "experts" else 1.0)
            elif isinstance(work, Attention):
                span = min(work.window or work.length, work.length)
                pairs = work.batch * work.heads * work.length * span / work.share
                total += 2.0 * pairs * (work.head_dim + work.value_dim)
    return total
