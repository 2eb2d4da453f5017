"""The buffers in which gradients are whole until they are reduced, from ZeRO-2 on (`parallel/bucket.py`, `parallel/data.py`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from meshwright.cost.program import Program
from meshwright.cost.units import unit_buffer_bytes, unit_elements
from meshwright.schedule.buckets import Bucket, unit_of
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.precision import WIDTH, StateDtypes

IN_FLIGHT = 2
"""Reductions under way at once; more than two buffers of a bucket's size are in use while a third one is filled."""
STEADY = 3
"""Micro-batches after which nothing changes any more."""

Key = tuple[int, Precision]
"""(elements, dtype): buffers are kept for the next of the same, whether for parameters or for gradients."""


def gradient_buffer_bytes(program: Program, layout: Layout, micro_batches: int) -> int:
    """Of the buffers that a rank keeps for gradients, beyond those that it has for the parameters of units.

    A bucket is whole from the first of its gradients until its reduction is over, which is waited for when a third one is to start;
    from the second micro-batch on what the reduction leaves here is added to what is kept, out of one more buffer.
    """
    if layout.zero < 2 or all(bucket.cuts == 1 for bucket in program.buckets):
        return 0
    compute, gradient = layout.precision, StateDtypes.of(layout).gradient
    most: Counter[Key] = Counter()
    for unit, coming, whole in _backward(program, micro_batches):
        gradients = Counter({(numel, gradient): count for numel, count in whole.items()})
        most |= gradients + Counter((numel, compute) for numel in unit_elements(program, layout, unit, coming))
    held = sum(numel * WIDTH[dtype] * count for (numel, dtype), count in most.items())
    return max(0, held - unit_buffer_bytes(program, layout))


def _last_in_layer(bucket: Bucket) -> tuple[bool, bool]:
    """Backward ends a layer with attention, after the experts, and with the first norm's vector."""
    return not bucket.decay, not bucket.routed


def _backward(program: Program, micro_batches: int) -> Iterator[tuple[str, str | None, Counter[int]]]:
    """At each unit of each backward of a step: the unit, the one before it in the model, and the whole gradients there are."""
    order = [unit for units in program.units for unit in units][::-1]
    waits: dict[int, Counter[str]] = {}
    touched: dict[str, list[int]] = {}
    for at, bucket in sorted(enumerate(program.buckets), key=lambda one: _last_in_layer(one[1])):
        units = {unit_of(shard.name) for shard in bucket.shards} if bucket.cuts > 1 else set()
        units = {unit if unit in order else order[0] for unit in units}  # the final norm goes with the head
        waits[at] = Counter(unit for unit in order if unit in units)
        for unit in units:
            touched.setdefault(unit, []).append(at)
    whole: Counter[int] = Counter()
    under_way: deque[Counter[int]] = deque()
    reduced: set[int] = set()
    for _ in range(min(micro_batches, STEADY)):
        missing = {at: sum(each.values()) for at, each in waits.items()}
        for place, unit in enumerate(order):
            for at in touched.get(unit, ()):
                bucket = program.buckets[at]
                if missing[at] == sum(waits[at].values()):
                    whole[bucket.numel] += 1
            yield unit, order[place + 1] if place + 1 < len(order) else None, Counter(whole)
            for at in touched.get(unit, ()):
                missing[at] -= 1
                if missing[at] == 0:
                    bucket = program.buckets[at]
                    while len(under_way) >= IN_FLIGHT:
                        whole -= under_way.popleft()
                    part = Counter([bucket.owned]) if at in reduced else Counter[int]()
                    reduced.add(at)
                    whole += part
                    under_way.append(part + Counter([bucket.numel]))
                    yield unit, None, Counter(whole)
