"""Attention of a layer on one rank: grouped-query and latent, and what context parallelism sends for its core. Symbols as in `parts.py`."""

from __future__ import annotations

from meshwright.cost.ops import Attention, Collective, Elementwise, Op, Under
from meshwright.cost.parts import Part, Shapes, columns, row, shared_down, whole_linear
from meshwright.spec.context import kv_copies
from meshwright.spec.model import LatentAttention

SINK_DIMS = 8
"""That a sink adds to queries and keys."""


def heads(s: Shapes, core: Part) -> Part:
    """Grouped-query attention."""
    model = s.model
    q_width, kv_width = s.heads * model.head_dim, s.kv_heads * model.head_dim
    qkv = columns(s, "attention.qkv", model.hidden, {"q": q_width, "k": kv_width, "v": kv_width})
    rotary = Elementwise("rotary", 4 * (q_width + kv_width) * s.T * s.q if model.rope else 0)
    out = row(s, "attention.out", q_width)
    saved = (q_width + 2 * kv_width) * s.T * s.q
    if model.qk_norm:
        saved += (q_width + kv_width) * s.T * s.q + (s.heads + s.kv_heads) * s.T * s.exact
    return Part(
        (*qkv.forward, rotary, *core.forward, *out.forward),
        (*out.backward, *core.backward, rotary, *qkv.backward),
        qkv.saved + saved + core.saved + out.saved,
        core.recomputed,
    )


def latent(s: Shapes, latent: LatentAttention, core: Part) -> Part:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1). The down-projections are whole on every tp rank; sequence
    parallel gathers their narrow outputs instead of the hidden states."""
    D = s.model.hidden
    queries = s.heads * (latent.nope_dim + latent.rope_dim)
    kv_width = latent.kv_rank + latent.rope_dim
    kv_down = shared_down(s, "attention.kv_down", D, kv_width)
    kv_up = whole_linear(s, "attention.kv_up", s.T, latent.kv_rank, s.heads * (latent.nope_dim + latent.value_dim))
    saved = (kv_width + latent.kv_rank) * s.T * s.q + s.T * s.exact
    if latent.q_rank is None:
        q = columns(s, "attention", D, {"q": queries})
    else:
        down = shared_down(s, "attention.q_down", D, latent.q_rank)
        up = whole_linear(s, "attention.q_up", s.T, latent.q_rank, queries)
        q = Part((*down.forward, *up.forward), (*up.backward, *down.backward), 0)
        saved += 2 * latent.q_rank * s.T * s.q + s.T * s.exact
    rotary = Elementwise("rotary", 4 * s.heads * latent.rope_dim * s.T * s.q)
    out = row(s, "attention.out", s.heads * latent.value_dim)
    qkv_saved = (2 * queries + s.heads * latent.value_dim) * s.T * s.q
    return Part(
        (*q.forward, *kv_down.forward, *kv_up.forward, rotary, *core.forward, *out.forward),
        (*out.backward, *core.backward, rotary, *kv_up.backward, *kv_down.backward, *q.backward),
        saved + qkv_saved + core.saved + out.saved,
        core.recomputed,
    )


def attention_core(s: Shapes, window: int | None) -> Part:
    """Between projections: fused attention, and what context parallelism sends for it.

    Queries, keys and values are kept by whoever made them, the output by the linear that reads it.
    """
    layout, latent = s.layout, s.model.latent
    kv_heads, head_dim, value_dim = s.kv_heads, s.model.head_dim, s.model.head_dim
    if latent is not None:
        kv_heads, head_dim, value_dim = s.heads, latent.nope_dim + latent.rope_dim, latent.value_dim
    forward, backward = _ring(s, kv_heads, head_dim, value_dim, window)
    if layout.cp_ulysses > 1:
        copies = kv_copies(kv_heads, layout.cp_ulysses)
        inward = _all_to_all(s, s.heads * head_dim + kv_heads * copies * (head_dim + value_dim))
        outward = _all_to_all(s, s.heads * value_dim)
        forward, backward = (inward, *forward, outward), (outward, *backward, inward)
    again = tuple(op for op in forward if isinstance(op, Attention)) if s.recomputes("core") else ()
    inputs, own = _core_saved(s, kv_heads, head_dim, value_dim, window)
    return Part(forward, (*again, *backward), inputs + (0 if again else own), again)


def _core_saved(s: Shapes, kv_heads: int, head_dim: int, value_dim: int, window: int | None) -> tuple[int, int]:
    """Of the inputs, what their makers do not keep: copies of key-value heads for ranks that share one, and, after rotary, angles
    that are looked up by position. Of the core itself: log-sum-exps; under Ulysses its output before that goes home, and, where a
    ring is inside, keys and values packed for it; a mask, and the dims of the sink's key, where the whole sequence is here
    (`models/attention.py`)."""
    layout, model = s.layout, s.model
    inputs = own = 0
    if layout.cp > 1 and model.rope:
        inputs += 4 * s.seq // layout.cp * (model.latent.rope_dim if model.latent else head_dim) * s.q
    if layout.cp_ulysses > 1:
        copies, pair = kv_copies(kv_heads, layout.cp_ulysses), kv_heads * (head_dim + value_dim) * s.T * s.q
        inputs += (copies - 1) * pair
        own += s.heads * value_dim * s.T * s.q + (copies * pair if layout.cp_ring > 1 else 0)
    if layout.cp_ring == 1 and ((window is not None and window < s.seq) or model.sinks):
        own += s.seq * (s.seq + model.sinks) * s.q
        sent = kv_heads * kv_copies(kv_heads, layout.cp_ulysses)
        own += model.sinks * SINK_DIMS * (s.heads + sent) * s.T * s.q
        keys = sent // layout.cp_ulysses * layout.micro_batch
        own += model.sinks * keys * (head_dim + SINK_DIMS + value_dim) * s.q
    return inputs, own + s.T * s.heads * 4


def _ring(
    s: Shapes, kv_heads: int, head_dim: int, value_dim: int, window: int | None
) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Forward and backward of the attention itself: `parallel/ring.py` sends keys and values, and in backward their gradients,
    while it computes with the block that it has."""
    layout, ring = s.layout, s.layout.cp_ring
    op = (layout.micro_batch, s.heads, s.seq, head_dim, value_dim, window)
    block, block_back = (Attention("attention", *op, backward=b, share=layout.cp * ring) for b in (False, True))
    if ring == 1:
        return (block,), (block_back,)
    held = max(1, kv_heads // layout.cp_ulysses)
    elements = layout.micro_batch * held * (s.seq // ring) * (head_dim + value_dim)
    keys_values, gradients = (
        Collective("cp", "send", ring, layout.stride("cp") * layout.cp_ulysses, elements * size)
        for size in (s.q, max(4, s.q))
    )
    forward = (Under(keys_values, (block,)),) * (ring - 1)
    backward = (Under(keys_values, (block_back,)), Under(gradients, ())) * (ring - 1)
    return (*forward, block), (*backward, block_back)


def _all_to_all(s: Shapes, width: int) -> Collective:
    return Collective("cp", "all_to_all", s.layout.cp_ulysses, s.layout.stride("cp"), s.T * width * s.q)
