"""Gradient buckets: the order and grouping in which data-parallel reduction takes a rank's parameters.

Like a pipeline schedule, the plan is made once and used by the cost model and by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.spec.shards import Shard

ALIGNMENT = 64
"""Parameters start at multiples of this many elements, so that vector loads stay aligned in the flat buffer."""

MIN_BUCKET_BYTES = 32 * 2**20
BUCKET_BYTES_PER_RANK = 4 * 2**20
"""A ring cuts a bucket into one piece per rank: the bucket grows with the group, or the pieces fall into the
latency regime (fabric.md 1.5: a 256 MiB bucket over 128 nodes runs at a tenth of the line rate)."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A flat buffer of `numel` elements holding `shards` at `offsets`. All its shards share one treatment."""

    shards: tuple[Shard, ...]
    offsets: tuple[int, ...]
    numel: int

    @property
    def decay(self) -> bool:
        return self.shards[0].decay

    @property
    def replicas(self) -> str | None:
        return self.shards[0].replicas

    @property
    def partial(self) -> bool:
        return self.shards[0].partial


def bucket_bytes(ranks: int) -> int:
    """The target size of a bucket reduced over `ranks` ranks."""
    return max(MIN_BUCKET_BYTES, BUCKET_BYTES_PER_RANK * ranks)


def plan_buckets(shards: Sequence[Shard], *, ranks: int, cuts: int, element_bytes: int) -> tuple[Bucket, ...]:
    """Group a rank's shards into buckets, last layer first (the order in which gradients become ready).

    `ranks`: size of the data-parallel group. `cuts`: parts of the optimizer state, of which each bucket is a
    multiple. `element_bytes`: of a gradient element. Shards that differ in weight decay or in how their gradient
    is completed go to different buckets.
    """
    limit = bucket_bytes(ranks) // element_bytes
    open_: dict[tuple[object, ...], list[Shard]] = {}
    filled: dict[tuple[object, ...], int] = {}
    out: list[Bucket] = []
    for shard in reversed(shards):
        key = (shard.decay, shard.replicas, shard.partial)
        waiting = open_.setdefault(key, [])
        if waiting and filled[key] + shard.numel > limit:
            out.append(_close(waiting, cuts))
            waiting.clear()
            filled[key] = 0
        waiting.append(shard)
        filled[key] = filled.get(key, 0) + _aligned(shard.numel)
    out += [_close(waiting, cuts) for waiting in open_.values() if waiting]
    return tuple(out)


def _close(shards: list[Shard], cuts: int) -> Bucket:
    offsets, end = [], 0
    for shard in shards:
        offsets.append(end)
        end += _aligned(shard.numel)
    return Bucket(tuple(shards), tuple(offsets), -(-end // cuts) * cuts)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
