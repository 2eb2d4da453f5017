"""A model small enough for a laptop, with the structure of the real one.

Every kind of layer stays (dense and sparse, each window, in the order in which they begin), and so do the ratio of query to
key-value heads, the ratio of experts to visited experts, groups of experts, latent attention, norms, biases and ties. Widths are
the smallest that the layout can cut. What the layout says about layers shrinks with them: the stages that hold more still do.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import NamedTuple

from meshwright.schedule.orders import check_micro_batches
from meshwright.schedule.stages import even_counts
from meshwright.spec.context import sequence_unit
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout
from meshwright.spec.model import Experts, LatentAttention, Model
from meshwright.spec.workload import Workload

HIDDEN, HEAD_DIM = 32, 8
SHORTEST = 32
"""Tokens of a sequence, at least. Rotary positions alone keep the gradient of a key bias from zero (without, it shifts all scores of a
query alike), and over fewer tokens they turn keys so little that in fp32 rounding shows."""


class Shrunk(NamedTuple):
    """`layout`: the one that was given, for as many layers as `model` has."""

    model: Model
    workload: Workload
    layout: Layout


def shrink(model: Model, layout: Layout) -> Shrunk:
    """The small model, and a workload that `layout` can run: two micro-batches, or as many as its schedule needs.

    Raises UserError where the layout could not split the real model either.
    """
    check_layout(layout, model, _real_workload(model, layout))
    tp, ulysses = layout.tp, layout.cp_ulysses
    seq = lcm(sequence_unit(layout.cp_ring, ulysses), layout.cp * tp)
    seq *= -(-SHORTEST // seq)
    counts = _counts(model, layout)
    layers = sum(counts)
    kv_heads = _kv_heads(model, tp, ulysses)
    latent = _latent(model.latent)
    experts = _experts(model.experts, layout) if model.experts else None
    small = replace(
        model,
        name=f"{model.name} (shrunk)",
        layers=layers,
        hidden=HIDDEN,
        ffn=8 * tp,
        vocab=32 * tp + 5,
        heads=kv_heads * (model.heads // model.kv_heads),
        kv_heads=kv_heads,
        head_dim=latent.nope_dim + latent.rope_dim if latent else HEAD_DIM,
        max_positions=seq,
        windows=tuple(None if w is None else seq // 2 for w in model.windows[:layers]),
        latent=latent,
        experts=experts,
        moe_layers=tuple(i for i in model.moe_layers if i < layers),
    )
    workload = Workload(seq, layout.dp * layout.micro_batch * _micro_batches(layout))
    shrunk = replace(
        layout,
        stage_layers=None if layout.stage_layers is None else counts,
        recompute_layers=_recomputed(model, layout, max(counts)),
    )
    check_layout(shrunk, small, workload)
    return Shrunk(small, workload, shrunk)


def _real_workload(model: Model, layout: Layout) -> Workload:
    """Any that the layout divides: what is asked is whether the model's own sizes can be cut."""
    seq = lcm(sequence_unit(layout.cp_ring, layout.cp_ulysses), layout.cp * layout.tp)
    return Workload(seq, layout.dp * layout.micro_batch * _micro_batches(layout))


def _micro_batches(layout: Layout) -> int:
    for count in (2, layout.pp, 2 * layout.pp):
        try:
            check_micro_batches(layout.schedule, layout.pp, count)
        except UserError:
            continue
        return count
    raise AssertionError("every schedule runs twice as many micro-batches as stages")


def _counts(model: Model, layout: Layout) -> tuple[int, ...]:
    """Layers of each chunk: the fewest that keep the order of the chunks by size and, in all, hold every kind of layer. Where some chunk
    of the real model keeps what other layers of it recompute, the largest has two at least."""
    chunks = layout.pp * layout.chunks
    kinds = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
    every = max(kinds.index(kind) for kind in set(kinds)) + 1
    keeps_some = _recomputes_part(model, layout)
    if layout.stage_layers is None:
        return even_counts(min(model.layers, max(2, every, chunks + keeps_some)), chunks)
    sizes = sorted(set(layout.stage_layers))
    fewest = 2 if keeps_some and len(sizes) == 1 else 1
    counts = tuple(sizes.index(held) + fewest for held in layout.stage_layers)
    while sum(counts) < every:
        counts = tuple(n + 1 if n == max(counts) else n for n in counts)
    fits = all(n <= held for n, held in zip(counts, layout.stage_layers, strict=True))
    return counts if fits else layout.stage_layers


def _recomputes_part(model: Model, layout: Layout) -> bool:
    """Whether some chunk of the real model keeps what other layers of it recompute."""
    held = layout.stage_layers or even_counts(model.layers, layout.pp * layout.chunks)
    return layout.recompute_layers is not None and layout.recompute_layers < max(held)


def _recomputed(model: Model, layout: Layout, most: int) -> int | None:
    """Of the layers of each chunk, `most` in the largest: not all, where a real chunk keeps some, else all."""
    if layout.recompute_layers is None:
        return None
    return min(layout.recompute_layers, max(1, most - 1) if _recomputes_part(model, layout) else most)


def _kv_heads(model: Model, tp: int, ulysses: int) -> int:
    """Cut where the real ones are cut, shared where they are shared."""
    if model.kv_heads < tp:
        return model.kv_heads
    group = model.heads // model.kv_heads
    heads_a_rank = lcm(ulysses, group) // group if model.kv_heads // tp >= ulysses else 1
    return tp * max(1, heads_a_rank, 2 if model.latent is None and group == 1 and tp == 1 else 1)


def _latent(latent: LatentAttention | None) -> LatentAttention | None:
    if latent is None:
        return None
    q_rank = None if latent.q_rank is None else 12
    return LatentAttention(q_rank=q_rank, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4)


def _experts(experts: Experts, layout: Layout) -> Experts:
    top_k = min(experts.top_k, 2)
    unit = lcm(layout.ep, experts.groups)
    count = max(-(-experts.count * top_k // experts.top_k // unit) * unit, unit)
    return replace(
        experts, count=count, top_k=top_k, ffn=8 * layout.etp, shared_ffn=8 * layout.tp if experts.shared_ffn else 0
    )
