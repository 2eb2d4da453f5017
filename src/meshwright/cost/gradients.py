"""The buffers in which gradients are whole until they are reduced, from ZeRO-2 on (`parallel/bucket.py`, `parallel/data.py`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from meshwright.cost.program import Program
from meshwright.cost.units import unit_buffer_bytes, unit_elements
from meshwright.schedule.buckets import Bucket, unit_of
from meshwright.spec.layout import Layout
from meshwright.spec.precision import WIDTH, StateDtypes

IN_FLIGHT = 2
"""Reductions under way at once; more than two buffers of a bucket's size are in use while a third one is filled."""
STEADY = 3
"""Micro-batches after which nothing changes any more."""


def gradient_buffer_bytes(program: Program, layout: Layout, micro_batches: int) -> int:
    """Of the buffers that a rank keeps for gradients, beyond those that it has for the parameters of units.

    A bucket is whole from the first of its gradients until its reduction is over, which is waited for when a third one is to start;
    from the second micro-batch on what the reduction leaves here is added to what is kept, out of one more buffer. Buffers are kept for
    the next of the same size and dtype, whether of parameters or of gradients.
    """
    if layout.zero < 2 or all(bucket.cuts == 1 for bucket in program.buckets):
        return 0
    gradient = StateDtypes.of(layout).gradient
    shared = gradient == layout.precision
    parameters = unit_elements(program, layout) if shared else None
    most: dict[int, int] = {}
    for unit, coming, whole in _backward(program, micro_batches):
        live = whole if parameters is None else whole + parameters(unit, coming)
        for numel, count in live.items():
            if count > most.get(numel, 0):
                most[numel] = count
    held = WIDTH[gradient] * sum(numel * count for numel, count in most.items())
    return max(0, held - unit_buffer_bytes(program, layout)) if shared else held


def _last_in_layer(bucket: Bucket) -> tuple[bool, bool]:
    """Backward ends a layer with attention, after the experts, and with the first norm's vector."""
    return not bucket.decay, not bucket.routed


def _backward(program: Program, micro_batches: int) -> Iterator[tuple[str, str | None, Counter[int]]]:
    """Wherever they change in the backwards of a step: the unit, the one before it in the model, and how many buffers of each size hold
    gradients."""
    order = [unit for units in program.units for unit in units][::-1]
    known = Counter(order)
    waits: dict[int, int] = {}
    touched: dict[str, list[int]] = {}
    for at, bucket in sorted(enumerate(program.buckets), key=lambda one: _last_in_layer(one[1])):
        units = {unit_of(shard.name) for shard in bucket.shards} if bucket.cuts > 1 else set()
        units = {unit if unit in known else order[0] for unit in units}  # the final norm goes with the head
        waits[at] = sum(known[unit] for unit in units)
        for unit in units:
            touched.setdefault(unit, []).append(at)
    whole: Counter[int] = Counter()
    under_way: deque[tuple[int, ...]] = deque()
    reduced: set[int] = set()
    for _ in range(min(micro_batches, STEADY)):
        missing = dict(waits)
        for place, unit in enumerate(order):
            for at in touched.get(unit, ()):
                if missing[at] == waits[at]:
                    whole[program.buckets[at].numel] += 1
            yield unit, order[place + 1] if place + 1 < len(order) else None, whole
            for at in touched.get(unit, ()):
                missing[at] -= 1
                if missing[at] == 0:
                    bucket = program.buckets[at]
                    while len(under_way) >= IN_FLIGHT:
                        whole.subtract(under_way.popleft())
                    part = (bucket.owned,) if at in reduced else ()
                    reduced.add(at)
                    whole.update(part)
                    under_way.append((bucket.numel, *part))
                    yield unit, None, whole
