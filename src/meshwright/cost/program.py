"""The program of one rank: what it computes, saves and sends for one micro-batch and one step.

Memory, time and traffic are folds over these lists; `trace` and the engine's ledger must agree with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.cost.ops import Collective, CollectiveOp, Elementwise, Piece
from meshwright.cost.parts import Shapes
from meshwright.cost.pieces import embedding_piece, head_piece, layer_piece
from meshwright.schedule.buckets import Bucket, plan_buckets
from meshwright.schedule.stages import Chunk, rank_shards, stage_chunks
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.precision import StateBytes
from meshwright.spec.shards import Seat
from meshwright.spec.workload import Workload

Pieces = tuple[tuple[Piece, int], ...]
"""(piece, how often it occurs), in model order."""


Brought = tuple[tuple[Bucket, ...], tuple[Bucket, ...]]
"""Buckets in forward, and in backward."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one rank does in a step: its chunks for every micro-batch, then the step's end."""

    chunks: tuple[Pieces, ...]
    boundary: tuple[Collective, ...]
    """Sent for every micro-batch."""
    brought: Brought
    """ZeRO-3: whose parameters are there only while they are used, for the forward and for the backward of every micro-batch."""
    gathers: tuple[tuple[Collective, ...], tuple[Collective, ...]]
    """ZeRO-3: parameters gathered for the forward, and for the backward, of every micro-batch."""
    scatters: tuple[Collective, ...]
    """From ZeRO-2 on: gradients reduced in the backward of every micro-batch."""
    buckets: tuple[Bucket, ...]
    gradient_reductions: tuple[Collective, ...]
    """In bucket order, once a step; each may run under the backward of the last micro-batch."""
    step_end: tuple[Collective, ...]
    """After backward, in order: nothing hides them."""
    optimizer: Elementwise
    units: tuple[tuple[str, ...], ...]
    """Of each chunk, in the order of the model: the parts whose parameters are used together."""
    casts: Elementwise
    """In each forward, and again in each backward, of every micro-batch."""
    data: int
    """Bytes of token ids and labels of the step, and of tables of angles, which are there all the time."""

    @property
    def pieces(self) -> Pieces:
        """Of all chunks."""
        return tuple(piece for chunk in self.chunks for piece in chunk)


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank: its stage and its index on the axes that cut parameters. Other coordinates do not change the program."""

    stage: int = 0
    tp: int = 0
    ep: int = 0
    etp: int = 0

    @property
    def seat(self) -> Seat:
        return Seat(self.tp, self.ep, self.etp)


StagePrograms = dict[tuple[int, ...], Program]
"""Of groups of stages that hold the same, in the order of their first."""


def rank_program(model: Model, layout: Layout, workload: Workload, place: Place) -> Program:
    """The program of the rank at `place`. The layout must have passed `spec.legality.check_layout`."""
    buckets = plan_buckets(rank_shards(model, layout, place.stage, place.seat), layout)
    chunks = stage_chunks(model.layers, layout)[place.stage]
    brought = _brought(layout, buckets, model.tied, chunks)
    return Program(
        chunks=chunk_pieces(model, layout, workload, place),
        boundary=boundary(model, layout, workload.seq, place.stage),
        brought=brought,
        gathers=(_gathers(layout, brought[0]), _gathers(layout, brought[1])),
        scatters=tuple(_data(layout, b, "reduce_scatter", b.numel) for b in buckets if layout.zero >= 2 and b.cuts > 1),
        buckets=buckets,
        gradient_reductions=tuple(_gradient_reductions(layout, buckets)),
        step_end=tuple(_step_end(model, layout, buckets)),
        optimizer=_optimizer(layout, buckets),
        units=tuple(tuple(_units(chunk, model.tied)) for chunk in chunks),
        casts=_casts(layout, buckets),
        data=_data_bytes(model, layout, workload),
    )


def _data_bytes(model: Model, layout: Layout, workload: Workload) -> int:
    """Ids and labels in int64, of whole sequences; sines and cosines of each position of one."""
    turned = 0 if model.rope is None else model.latent.rope_dim if model.latent else model.head_dim
    ids = 2 * 8 * workload.global_batch // layout.dp * workload.seq
    return ids + 2 * workload.seq * turned * StateBytes.of(layout).compute


def chunk_pieces(model: Model, layout: Layout, workload: Workload, place: Place) -> tuple[Pieces, ...]:
    """The pieces of each chunk of a stage."""
    local = _local(layout)
    return tuple(_pieces(model, local, workload, place, chunk) for chunk in stage_chunks(model.layers, layout)[place.stage])


def _pieces(model: Model, local: Layout, workload: Workload, place: Place, chunk: Chunk) -> Pieces:
    seq, imbalance = workload.seq, workload.expert_imbalance
    again = kept = local
    first = len(chunk.layers)
    if local.recompute_layers is not None:
        first = local.recompute_layers
        again = replace(local, recompute_layers=None)
        kept = replace(again, recompute="none", recompute_parts=("core",))
    kinds = [(at < first, model.window(i), model.is_moe(i)) for at, i in enumerate(chunk.layers)]
    pieces = [
        (layer_piece(model, again if kind[0] else kept, seq, *kind[1:], imbalance), kinds.count(kind))
        for kind in dict.fromkeys(kinds)
    ]
    if chunk.first:
        pieces.insert(0, (embedding_piece(model, local, seq), 1))
    if chunk.last:
        pieces.append((head_piece(model, local, seq, place.tp), 1))
    return tuple(pieces)


def _local(layout: Layout) -> Layout:
    """The part of a layout that a piece depends on, so that a search prices each piece once."""
    if layout.order[0] != "tp" or layout.ep > 1 or layout.etp > 1 or layout.cp > 1:
        return layout
    return Layout(
        tp=layout.tp,
        sp=layout.sp,
        async_tp=layout.async_tp,
        micro_batch=layout.micro_batch,
        recompute=layout.recompute,
        recompute_parts=layout.recompute_parts,
        recompute_layers=layout.recompute_layers,
        precision=layout.precision,
        gradient_dtype=layout.gradient_dtype,
        order=layout.order,
    )


def boundary(model: Model, layout: Layout, seq: int, stage: int) -> tuple[Collective, ...]:
    """What a stage sends for a micro-batch: from each chunk an activation onwards and a gradient back, unless the neighbouring
    chunk is on the same stage."""
    send = Collective("pp", "send", layout.pp, layout.stride("pp"), Shapes(model, layout, seq).residual_bytes)
    every = stage_chunks(model.layers, layout)
    owner = {chunk.place: at for at, chunks in enumerate(every) for chunk in chunks}
    neighbours = [place for chunk in every[stage] for place in (chunk.place - 1, chunk.place + 1)]
    return (send,) * sum(owner.get(place, stage) != stage for place in neighbours)


def _data(layout: Layout, bucket: Bucket, op: CollectiveOp, elements: int) -> Collective:
    """Among the ranks that share a bucket's state: gradients, or parameters for an all-gather: as they are computed with where
    they are gathered for use, as they are kept where they are gathered to be kept."""
    bytes_ = StateBytes.of(layout, cast=bucket.is_cast)
    gathered = bytes_.parameter if bucket.unit is None else bytes_.compute
    size = gathered if op == "all_gather" else bytes_.gradient
    axis, stride = ("edp", layout.ep * layout.etp) if bucket.routed else ("dp", _data_stride(layout))
    return Collective(axis, op, bucket.cuts, stride, elements * size)


def _replicate(layout: Layout, bucket: Bucket) -> Collective | None:
    """The sum over ranks that hold the same part of the state."""
    ranks = layout.edp if bucket.routed else layout.data_ranks
    if ranks == bucket.cuts:
        return None
    axis, stride = ("edp", layout.ep * layout.etp) if bucket.routed else ("dp", _data_stride(layout))
    nbytes = bucket.owned * StateBytes.of(layout).gradient
    return Collective(axis, "all_reduce", ranks // bucket.cuts, stride * bucket.cuts, nbytes)


def _data_stride(layout: Layout) -> int:
    """Between neighbours of the ranks that hold the same dense weights: the mean, where another axis lies between dp and cp."""
    spans = [layout.stride(axis) * layout.degree(axis) for axis in ("dp", "cp") if layout.degree(axis) > 1]
    return max(spans, default=layout.data_ranks) // layout.data_ranks


def _brought(layout: Layout, buckets: tuple[Bucket, ...], tied: bool, chunks: tuple[Chunk, ...]) -> Brought:
    """See `parallel/units.py`: the embedding is brought for forward only; without a pipeline the head stays for backward."""
    forward: list[Bucket] = []
    backward: list[Bucket] = []
    held = {"embedding": any(c.first for c in chunks), "head": any(c.last for c in chunks)}
    for bucket in buckets:
        if bucket.unit is None:
            continue
        is_head = bucket.unit == "head" or (bucket.unit == "embedding" and tied and held["head"])
        is_embedding = bucket.unit == "embedding" and held["embedding"]
        is_layer = bucket.unit.startswith("layers.")
        forward += [bucket] * (is_layer + is_head + is_embedding)
        backward += [bucket] * (is_layer + (is_head and layout.pp > 1))
    return tuple(forward), tuple(backward)


def _units(chunk: Chunk, tied: bool) -> Iterator[str]:
    if chunk.first:
        yield "embedding"
    yield from (f"layers.{layer}" for layer in chunk.layers)
    if chunk.last:
        yield "embedding" if tied else "head"


def _gathers(layout: Layout, buckets: tuple[Bucket, ...]) -> tuple[Collective, ...]:
    return tuple(_data(layout, bucket, "all_gather", bucket.numel) for bucket in buckets if bucket.cuts > 1)


def _gradient_reductions(layout: Layout, buckets: tuple[Bucket, ...]) -> Iterator[Collective]:
    for bucket in buckets:
        if bucket.cuts == 1 and (sum_ := _replicate(layout, bucket)):
            yield sum_
        elif bucket.cuts > 1 and layout.zero < 2:
            yield _data(layout, bucket, "reduce_scatter", bucket.numel)


def _step_end(model: Model, layout: Layout, buckets: tuple[Bucket, ...]) -> Iterator[Collective]:
    """Token count, sums over replicas, loss and gradient norm, and ZeRO's parameter gather."""
    bytes_ = StateBytes.of(layout)
    if layout.dp > 1:
        yield Collective("dp", "all_reduce", layout.dp, layout.stride("dp"), 8)
    groups = {
        "tp": ("tp", layout.tp, layout.stride("tp")),
        "kv": ("tp", max(1, layout.tp // model.kv_heads), layout.stride("tp")),
        "embedding": ("pp", 2, layout.stride("pp") * (layout.pp - 1)),
        "etp": ("etp", layout.etp, 1),
    }
    for bucket in buckets:
        if bucket.cuts > 1 and (sum_ := _replicate(layout, bucket)):
            yield sum_
        if bucket.partial and bucket.replicas:
            axis, size, stride = groups[bucket.replicas]
            yield Collective(axis, "all_reduce", size, stride, bucket.owned * bytes_.gradient)
    for axis in ("tp", "cp", "pp", "dp"):
        if layout.degree(axis) > 1:
            yield Collective(axis, "all_reduce", layout.degree(axis), layout.stride(axis), 16)
    for bucket in buckets:
        if bucket.cuts > 1 and bucket.unit is None:
            yield _data(layout, bucket, "all_gather", bucket.numel)


def _casts(layout: Layout, buckets: tuple[Bucket, ...]) -> Elementwise:
    """Parameters that are kept in another dtype are read and written in each forward, and again in each backward."""
    cast = 0
    for bucket in buckets:
        if bucket.is_cast:
            bytes_ = StateBytes.of(layout, cast=True)
            cast += (bucket.owned if bucket.unit else bucket.numel) * (bytes_.parameter + bytes_.compute)
    return Elementwise("casts", cast)


def _optimizer(layout: Layout, buckets: tuple[Bucket, ...]) -> Elementwise:
    """AdamW over the owned elements reads and writes all it holds; the gradients are also put in place, normed and clipped."""
    total = 0
    for bucket in buckets:
        bytes_ = StateBytes.of(layout, cast=bucket.is_cast)
        update = bucket.owned * (2 * (bytes_.optimizer + bytes_.parameter) + bytes_.gradient)
        total += update + bucket.numel * bytes_.gradient + bucket.owned * 3 * bytes_.gradient
    return Elementwise("optimizer", total)
