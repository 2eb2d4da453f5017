"""Every parameter of a Model: name, shape and the part it plays under parallelism, in model order.

Linear weights are [out, in] and fused matrices are listed by part (GPT-2's transposed `c_attn` is q, k and v here), so
that the count is that of the published checkpoints to the last parameter. Buffers are not parameters: rotary
frequencies and the selection bias of DeepSeek-V3's router are absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from meshwright.spec.model import Experts, LatentAttention, Model

Role = Literal["vocab", "column", "row", "kv", "head", "replicated", "expert_column", "expert_row", "expert"]
"""How a parameter is split.

Under tensor parallel: vocab and column on dim 0 (vocab unevenly if need be), row on dim 1, kv on dim 0 by key-value heads
and replicated where heads are fewer than ranks; head is replicated and used head by head, replicated is replicated and
used in the norm regions. Under expert parallel, the stacked weights of the routed experts are split on dim 0; within one
expert, expert_column is split on dim 1, expert_row on dim 2 and expert not at all.
"""


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    """None for the embedding, the final norm and the head."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decay(self) -> bool:
        """Weight decay applies to matrices; the stacked biases of experts have two dims and are biases still."""
        return len(self.shape) >= 2 and not self.name.endswith(".bias")

    @property
    def routed(self) -> bool:
        """Belongs to the routed experts, of which a token visits only some."""
        return self.role.startswith("expert")


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters. `active` leaves out the routed experts a token does not visit; `embedding` is the lookup
    tables (tokens and learned positions), which multiply nothing; a tied table is counted once, in both."""

    total: int
    active: int
    embedding: int


def parameters(model: Model) -> tuple[Parameter, ...]:
    """All of them: embedding, layers, final norm, head."""
    layers = [p for layer in range(model.layers) for p in layer_parameters(model, layer)]
    return (*embedding_parameters(model), *layers, *head_parameters(model))


@lru_cache(maxsize=256)
def count_parameters(model: Model) -> Counts:
    every = parameters(model)
    total = sum(p.numel for p in every)
    routed = sum(p.numel for p in every if p.routed)
    visited = routed // model.experts.count * model.experts.top_k if model.experts else 0
    return Counts(total, total - routed + visited, sum(p.numel for p in embedding_parameters(model)))


@lru_cache(maxsize=256)
def embedding_parameters(model: Model) -> tuple[Parameter, ...]:
    tokens = Parameter("embedding.tokens.weight", (model.vocab, model.hidden), "vocab", None)
    if model.rope is not None:
        return (tokens,)
    rows = model.max_positions + model.position_offset
    return (tokens, Parameter("embedding.positions.weight", (rows, model.hidden), "replicated", None))


@lru_cache(maxsize=256)
def head_parameters(model: Model) -> tuple[Parameter, ...]:
    """The final norm, and the output head unless it is the embedding's own table."""
    norm = tuple(_norm(model, "norm", None))
    return norm if model.tied else (*norm, Parameter("head.weight", (model.vocab, model.hidden), "vocab", None))


@lru_cache(maxsize=4096)
def layer_parameters(model: Model, layer: int) -> tuple[Parameter, ...]:
    at = f"layers.{layer}"
    attention = _heads(model, layer) if model.latent is None else _latent(model, model.latent, layer)
    if model.experts is not None and model.is_moe(layer):
        mlp = _moe(model, model.experts, layer)
    else:
        mlp = _mlp(model, f"{at}.mlp", model.ffn, layer)
    return (
        *_norm(model, f"{at}.attention_norm", layer),
        *attention,
        *_linear(f"{at}.attention.out", (model.hidden, _value_width(model)), "row", model.out_bias, layer),
        *_norm(model, f"{at}.mlp_norm", layer),
        *mlp,
    )


def _heads(model: Model, layer: int) -> Iterator[Parameter]:
    """Grouped-query attention (arXiv 2305.13245), with the per-head norms of Qwen 3 and the sinks of GPT-OSS."""
    at, bias = f"layers.{layer}.attention", model.qkv_bias
    yield from _linear(f"{at}.qkv.q", (model.heads * model.head_dim, model.hidden), "column", bias, layer)
    yield from _linear(f"{at}.qkv.k", (model.kv_heads * model.head_dim, model.hidden), "kv", bias, layer)
    yield from _linear(f"{at}.qkv.v", (model.kv_heads * model.head_dim, model.hidden), "kv", bias, layer)
    if model.qk_norm:
        yield Parameter(f"{at}.q_norm.weight", (model.head_dim,), "head", layer)
        yield Parameter(f"{at}.k_norm.weight", (model.head_dim,), "head", layer)
    if model.sinks:
        yield Parameter(f"{at}.sinks", (model.heads,), "column", layer)


def _latent(model: Model, latent: LatentAttention, layer: int) -> Iterator[Parameter]:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): the key's `rope_dim` comes straight from `kv_down`,
    one for all heads, and passes neither the norm nor `kv_up`."""
    at, bias = f"layers.{layer}.attention", model.qkv_bias
    queries = model.heads * (latent.nope_dim + latent.rope_dim)
    if latent.q_rank is None:
        yield from _linear(f"{at}.q", (queries, model.hidden), "column", False, layer)
    else:
        yield from _linear(f"{at}.q_down", (latent.q_rank, model.hidden), "replicated", bias, layer)
        yield Parameter(f"{at}.q_down_norm.weight", (latent.q_rank,), "replicated", layer)
        yield from _linear(f"{at}.q_up", (queries, latent.q_rank), "column", False, layer)
    yield from _linear(f"{at}.kv_down", (latent.kv_rank + latent.rope_dim, model.hidden), "replicated", bias, layer)
    yield Parameter(f"{at}.kv_down_norm.weight", (latent.kv_rank,), "replicated", layer)
    keys_and_values = model.heads * (latent.nope_dim + latent.value_dim)
    yield from _linear(f"{at}.kv_up", (keys_and_values, latent.kv_rank), "column", False, layer)


def _mlp(model: Model, at: str, ffn: int, layer: int) -> Iterator[Parameter]:
    for part in _up_parts(model):
        yield from _linear(f"{at}.gate_up.{part}", (ffn, model.hidden), "column", model.mlp_bias, layer)
    yield from _linear(f"{at}.down", (model.hidden, ffn), "row", model.mlp_bias, layer)


def _moe(model: Model, experts: Experts, layer: int) -> Iterator[Parameter]:
    """The router, the routed experts stacked on dim 0, and the shared expert."""
    at, n = f"layers.{layer}.moe", experts.count
    yield from _linear(f"{at}.router", (n, model.hidden), "replicated", experts.router_bias, layer)
    for part in _up_parts(model):
        yield Parameter(f"{at}.experts.gate_up.{part}.weight", (n, experts.ffn, model.hidden), "expert_column", layer)
        if experts.bias:
            yield Parameter(f"{at}.experts.gate_up.{part}.bias", (n, experts.ffn), "expert_column", layer)
    yield Parameter(f"{at}.experts.down.weight", (n, model.hidden, experts.ffn), "expert_row", layer)
    if experts.bias:
        yield Parameter(f"{at}.experts.down.bias", (n, model.hidden), "expert", layer)
    if experts.shared_ffn:
        yield from _mlp(model, f"{at}.shared", experts.shared_ffn, layer)


def _up_parts(model: Model) -> tuple[str, ...]:
    return ("gate", "up") if model.gated else ("up",)


def _value_width(model: Model) -> int:
    return model.heads * (model.latent.value_dim if model.latent else model.head_dim)


def _norm(model: Model, at: str, layer: int | None) -> Iterator[Parameter]:
    yield Parameter(f"{at}.weight", (model.hidden,), "replicated", layer)
    if model.norm == "layernorm":
        yield Parameter(f"{at}.bias", (model.hidden,), "replicated", layer)


def _linear(at: str, shape: tuple[int, int], role: Role, bias: bool, layer: int) -> Iterator[Parameter]:
    """A weight [out, in] and its bias [out]. A row-split weight gives partial sums, so its bias is added once, whole."""
    yield Parameter(f"{at}.weight", shape, role, layer)
    if bias:
        yield Parameter(f"{at}.bias", shape[:1], "replicated" if role == "row" else role, layer)
