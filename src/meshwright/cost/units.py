"""The buffers in which parameters are whole, or in the dtype of the computation, while they are used (`parallel/units.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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


def unit_elements(program: Program, layout: Layout) -> Callable[[str, str | None], Counter[int]]:
    """How many buffers of each number of elements are in use while the parameters of one unit are there and those of the unit before it
    are on their way, if any; the embedding's are not needed in backward."""
    kept, ahead = _parts(program, layout)

    def in_use(here: str, coming: str | None) -> Counter[int]:
        on_their_way = ahead.get(coming, ()) if coming and coming != "embedding" else ()
        return Counter([*kept.get(here, ()), *ahead.get(here, ()), *on_their_way])

    return in_use


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
