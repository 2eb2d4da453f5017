"""The buffers in which parameters are whole, or in the dtype of the computation, while they are used (`parallel/units.py`), and those
in which gradients are whole until they are reduced (`parallel/data.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from meshwright.cost.offload import keeps_parameters_away
from meshwright.cost.program import Program
from meshwright.schedule.buckets import Bucket, unit_of
from meshwright.spec.layout import Layout
from meshwright.spec.precision import WIDTH, StateBytes


def unit_buffer_bytes(program: Program, layout: Layout) -> int:
    """A unit's parameters are brought while those of the one before are there; buffers are kept for the next of the same size, so of
    each size there are as many as are ever in use at once. Of parameters to the byte; gradients as if those of a unit came evenly."""
    kept, ahead = _parts(program, layout)
    most: Counter[int] = Counter()
    for order in program.units:
        backward = [
            (unit, before) for before, unit in pairwise(order) if before != "embedding"
        ]  # which needs no parameters
        for here, coming in (*pairwise(order), *backward, *((unit, None) for unit in order)):
            live = Counter([*kept.get(here, ()), *ahead.get(here, ()), *(ahead.get(coming, ()) if coming else ())])
            most |= live
    parameters = WIDTH[layout.precision] * sum(numel * count for numel, count in most.items())
    return parameters + _gradient_buffer_bytes(program, layout)


REDUCTIONS = 2
"""Under way at once: `IN_FLIGHT` of `parallel/data.py`, which must not be imported here."""


def _gradient_buffer_bytes(program: Program, layout: Layout) -> int:
    """From ZeRO-2 on a bucket's gradients are whole from the first to come until two more reductions have begun; from the second
    micro-batch on each ends in a buffer of the rank's part, to be added."""
    if layout.zero < 2:
        return 0
    passing = [bucket for bucket in program.buckets if bucket.cuts > 1]
    times = _gradient_times(program)
    moments = sorted(
        (at, is_last, index)
        for index, bucket in enumerate(passing)
        for is_last, at in enumerate((min(times[id(bucket)]), max(times[id(bucket)])))
    )
    used: Counter[int] = Counter()
    most: Counter[int] = Counter()
    pending: list[Bucket] = []
    for _, is_last, index in moments:
        bucket = passing[index]
        if is_last:
            if len(pending) == REDUCTIONS:
                done = pending.pop(0)
                used -= Counter([done.numel, done.owned])
            pending.append(bucket)
            used[bucket.owned] += 1
        else:
            used[bucket.numel] += 1
        most |= used
    return StateBytes.of(layout).gradient * sum(numel * count for numel, count in most.items())


def _gradient_times(program: Program) -> dict[int, list[float]]:
    """By bucket, when each of its gradients comes: the unit's place in backward, and the shard's among those of the unit that are
    treated alike, which are planned in the order of backward. The last norm's come with the head's."""
    backward = [unit for order in reversed(program.units) for unit in reversed(order)]
    kinds = [
        (b, (b.decay, b.replicas, b.partial, b.routed, unit_of(shard.name))) for b in program.buckets for shard in b.shards
    ]
    number, seen = Counter(kind for _, kind in kinds), Counter[tuple[object, ...]]()
    out: dict[int, list[float]] = {id(b): [] for b in program.buckets}
    for bucket, kind in kinds:
        seen[kind] += 1
        unit = str(kind[-1])
        places = [at for at, name in enumerate(backward) if name == unit] or [0]
        out[id(bucket)] += [at + (seen[kind] - 1) / number[kind] for at in places]
    return out


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
