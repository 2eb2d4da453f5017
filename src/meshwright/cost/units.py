"""The buffers in which parameters are whole, or in the dtype of the computation, while they are used (`parallel/units.py`)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from meshwright.cost.offload import keeps_parameters_away
from meshwright.cost.program import Program
from meshwright.schedule.buckets import Bucket, unit_of
from meshwright.spec.layout import Layout
from meshwright.spec.precision import WIDTH


def unit_buffer_bytes(program: Program, layout: Layout) -> int:
    """A unit's parameters are brought while those of the one before are there; buffers are kept for the next of the same size, so of
    each size there are as many as are ever in use at once. To the byte."""
    kept, ahead = _parts(program, layout)
    most: Counter[int] = Counter()
    for order in program.units:
        backward = [
            (unit, before) for before, unit in pairwise(order) if before != "embedding"
        ]  # which needs no parameters
        for here, coming in (*pairwise(order), *backward, *((unit, None) for unit in order)):
            live = Counter([*kept.get(here, ()), *ahead.get(here, ()), *(ahead.get(coming, ()) if coming else ())])
            most |= live
    return WIDTH[layout.precision] * sum(numel * count for numel, count in most.items())


class UnitElements:
    """How many buffers of each number of elements are in use for the parameters of one unit and of that which comes next, if any."""

    def __init__(self, program: Program, layout: Layout):
        self._kept, self._ahead = _parts(program, layout)

    def forward(self, here: str, coming: str | None) -> Counter[int]:
        return Counter(
            [*self._kept.get(here, ()), *self._ahead.get(here, ()), *(self._ahead.get(coming, ()) if coming else ())]
        )

    def backward(self, here: str, place: int, coming: str | None) -> Counter[int]:
        """`place`: of the unit in its chunk. The embedding, which is first, needs no parameters in backward."""
        if here == "embedding" and place == 0:
            return Counter()
        return self.forward(here, coming if coming != "embedding" else None)


def _parts(program: Program, layout: Layout) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Elements of each part of each unit: of those that are only cast, and of those that are gathered or read, which come ahead."""
    kept: dict[str, list[int]] = {}
    ahead: dict[str, list[int]] = {}
    for bucket in program.buckets:
        if bucket.unit is not None and (bucket.cuts > 1 or keeps_parameters_away(bucket, layout)):
            ahead.setdefault(bucket.unit, []).append(bucket.numel)
        elif bucket.is_cast:
            for unit, numel in _spans(bucket).items():
                kept.setdefault(unit, []).append(numel)
    return kept, ahead


def _spans(bucket: Bucket) -> dict[str, int]:
    """Elements of each unit, which are neighbours in the bucket."""
    if bucket.unit is not None:
        return {bucket.unit: bucket.numel}
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for shard, offset in zip(bucket.shards, bucket.offsets, strict=True):
        unit = unit_of(shard.name)
        starts.setdefault(unit, offset)
        ends[unit] = offset + shard.numel
    return {unit: ends[unit] - start for unit, start in starts.items()}
