"""Gradient buckets: the order and grouping in which data-parallel reduction takes a rank's parameters.

Like a pipeline schedule, the plan is made once and used by the cost model and by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from meshwright.spec.layout import Layout
from meshwright.spec.precision import StateBytes, StateDtypes
from meshwright.spec.shards import Shard

ALIGNMENT = 64
"""Parameters start at multiples of this many elements, so that vector loads stay aligned in the flat buffer."""

MIN_BUCKET_BYTES = 32 * 2**20
BUCKET_BYTES_PER_RANK = 4 * 2**20
"""A ring cuts a bucket into one piece per rank: the bucket grows with the group, or the pieces fall into the
latency regime (fabric.md 1.5: a 256 MiB bucket over 128 nodes runs at a tenth of the line rate)."""


IN_TURN = 3
"""Buckets whose offloaded state is on a rank at once in the optimizer: one arrives, one is updated, one leaves."""
AHEAD = 2
"""Units that are on their way while one computes: the next is gathered and, where offloaded, the one after it is read."""

TAIL_PART = 8
"""The last bucket holds at most this part of a full one."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A flat buffer of `numel` elements holding `shards` at `offsets`. All its shards share one treatment."""

    shards: tuple[Shard, ...]
    offsets: tuple[int, ...]
    numel: int
    cuts: int
    """Parts that its state is cut into under ZeRO; `numel` is a multiple."""
    unit: str | None = None
    """Under ZeRO-3, the part of the model (a layer, the embedding, the head) for which these parameters are gathered; None: they
    are always whole."""
    is_cast: bool = False
    """Kept in another dtype than they are computed in: cast unit by unit, on the way into the computation."""

    @property
    def owned(self) -> int:
        """Elements whose state one rank keeps."""
        return self.numel // self.cuts

    @property
    def gaps(self) -> list[slice]:
        """Elements that belong to no shard."""
        ends = [offset + shard.numel for shard, offset in zip(self.shards, self.offsets, strict=True)]
        return [slice(a, b) for a, b in zip(ends, (*self.offsets[1:], self.numel), strict=True) if a < b]

    @property
    def decay(self) -> bool:
        return self.shards[0].decay

    @property
    def replicas(self) -> str | None:
        return self.shards[0].replicas

    @property
    def partial(self) -> bool:
        return self.shards[0].partial

    @property
    def routed(self) -> bool:
        return self.shards[0].routed


def bucket_bytes(ranks: int) -> int:
    """The target size of a bucket reduced over `ranks` ranks."""
    return max(MIN_BUCKET_BYTES, BUCKET_BYTES_PER_RANK * ranks)


def plan_buckets(shards: Sequence[Shard], layout: Layout) -> tuple[Bucket, ...]:
    """Group a rank's shards into buckets, last layer first (the order in which gradients become ready).

    A bucket's length is a multiple of the parts that its state is cut into. Shards that differ in weight decay, in how their
    gradient is completed, in their dtype or, under ZeRO-3, in when they are gathered go to different buckets.
    """
    open_: dict[tuple[object, ...], list[Shard]] = {}
    filled: dict[tuple[object, ...], int] = {}
    out: list[Bucket] = []
    casts = StateDtypes.of(layout).is_cast
    limits = {routed: bucket_limit(layout, routed) for routed in (False, True)}
    for shard in reversed(shards):
        unit = unit_of(shard.name) if layout.zero == 3 and shard.gathered else None
        key = (unit, shard.decay, shard.replicas, shard.partial, shard.routed, casts and shard.gathered)
        waiting, numel = open_.setdefault(key, []), shard.numel
        if waiting and unit is None and filled[key] + numel > limits[shard.routed]:
            out.append(_close(waiting, unit, layout))
            waiting.clear()
            filled[key] = 0
        waiting.append(shard)
        filled[key] = filled.get(key, 0) + _aligned(numel)
    for (unit_, *_), waiting in open_.items():
        parts = [waiting] if unit_ is not None else _without_heavy_tail(waiting, limits[waiting[0].routed])
        out += [_close(part, unit_, layout) for part in parts]
    return tuple(out)


def bucket_limit(layout: Layout, routed: bool) -> int:
    """Elements of a full bucket: only a shard that is larger by itself, or a unit of ZeRO-3, makes a larger one."""
    return bucket_bytes(layout.edp if routed else layout.data_ranks) // StateBytes.of(layout).gradient


def _without_heavy_tail(shards: list[Shard], limit: int) -> list[list[Shard]]:
    """The last bucket is reduced when backward is over, and nothing hides it: what is over a part of `limit` goes before it."""
    last = len(shards) - 1
    room = limit // TAIL_PART - _aligned(shards[last].numel)
    while last > 0 and (room := room - _aligned(shards[last - 1].numel)) >= 0:
        last -= 1
    return [shards[:last], shards[last:]] if last > 0 else [shards]


@cache
def unit_of(name: str) -> str:
    """The part of the model that a parameter belongs to: `layers.3`, `embedding`, `norm` or `head`."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "layers" else first


def _close(shards: list[Shard], unit: object, layout: Layout) -> Bucket:
    cuts = layout.expert_state_shards if shards[0].routed else layout.state_shards
    offsets, end = [], 0
    for shard in shards:
        offsets.append(end)
        end += _aligned(shard.numel)
    assert unit is None or isinstance(unit, str)
    is_cast = StateDtypes.of(layout).is_cast and shards[0].gathered
    return Bucket(tuple(shards), tuple(offsets), -(-end // cuts) * cuts, cuts, unit, is_cast)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
