"""The buffers in which gradients are whole until they are reduced, from ZeRO-2 on (`parallel/bucket.py`, `parallel/data.py`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from meshwright.cost.program import Program
from meshwright.cost.units import unit_buffer_bytes, unit_elements
from meshwright.schedule.buckets import Bucket, unit_of
from meshwright.spec.layout import Layout
from meshwright.spec.precision import WIDTH, StateDtypes

IN_FLIGHT = 2
"""Reductions under way at once; more than two buffers of a bucket's size are in use while a third one is filled."""
STEADY = 3
"""Micro-batches on one chunk after which nothing changes any more."""


class Part(NamedTuple):
    """What one unit of a chunk adds to a bucket: gradients that come with the first half of a split backward, and with the second."""

    bucket: int
    first: int
    second: int


class GradientBuffers:
    """`bytes`: of the buffers that a rank keeps for gradients, beyond those that it has for the parameters of units, while its backwards
    pass.

    A bucket is whole from the first of its gradients until its reduction is over, which is waited for when a third one is to start;
    from its second reduction on, what that leaves here is added to what is kept, out of one more buffer. Several chunks may fill a bucket
    together; it is reduced when as many gradients are in as one micro-batch gives on all of them. Buffers are kept for the next of the same
    size and dtype, whether of parameters or of gradients.
    """

    def __init__(self, program: Program, layout: Layout):
        self.buckets, self.is_used = program.buckets, layout.zero >= 2 and any(b.cuts > 1 for b in program.buckets)
        self.bytes = 0
        if not self.is_used:
            return
        gradient = StateDtypes.of(layout).gradient
        self._width, shared = WIDTH[gradient], gradient == layout.precision
        self._parameters = unit_elements(program, layout) if shared else None
        self._free = unit_buffer_bytes(program, layout) if shared else 0
        self.units = program.units
        self._parts = _parts(program)
        self._expected = [0] * len(self.buckets)
        for chunk in self._parts:
            for parts in chunk:
                for part in parts:
                    self._expected[part.bucket] += part.first + part.second
        self._missing = list(self._expected)
        self._whole: Counter[int] = Counter()
        self._most: dict[int, int] = {}
        self._under_way: deque[tuple[int, ...]] = deque()
        self._reduced: set[int] = set()

    def backward(self, chunk: int, *, split: bool) -> Iterator[int]:
        """Places of the chunk's units, from the last, each as often as the buffers change while backward is there."""
        units = self.units[chunk]
        for place in reversed(range(len(units))):
            coming = units[place - 1] if place else None
            adding = [(part.bucket, part.first + (0 if split else part.second)) for part in self._parts[chunk][place]]
            for _ in self._added([one for one in adding if one[1]], units[place], coming):
                yield place

    def weights(self, chunk: int) -> Iterator[None]:
        """The second half of a split backward."""
        for parts in self._parts[chunk][::-1]:
            yield from self._added([(part.bucket, part.second) for part in parts if part.second], None, None)

    def _added(self, adding: list[tuple[int, int]], unit: str | None, coming: str | None) -> Iterator[None]:
        for at, _ in adding:
            self._take(at)
        self._count(unit, coming)
        yield
        for at, count in adding:
            self._missing[at] -= count
            while self._missing[at] <= 0:
                self._reduce(at)
                self._count(unit, None)
                yield
                if self._missing[at] < self._expected[at]:
                    self._whole[self.buckets[at].numel] += 1

    def _take(self, at: int) -> None:
        if self._missing[at] == self._expected[at]:
            self._whole[self.buckets[at].numel] += 1

    def _reduce(self, at: int) -> None:
        while len(self._under_way) >= IN_FLIGHT:
            self._whole.subtract(self._under_way.popleft())
        bucket = self.buckets[at]
        part = (bucket.owned,) if at in self._reduced else ()
        self._reduced.add(at)
        self._whole.update(part)
        self._under_way.append((bucket.numel, *part))
        self._missing[at] += self._expected[at]

    def _count(self, unit: str | None, coming: str | None) -> None:
        in_use = self._whole
        if self._parameters is not None and unit is not None:
            in_use = in_use + self._parameters(unit, coming)
        for numel, count in in_use.items():
            if count > self._most.get(numel, 0):
                self._most[numel] = count
        self.bytes = max(0, self._width * sum(numel * count for numel, count in self._most.items()) - self._free)


def _last_in_layer(bucket: Bucket) -> tuple[bool, bool]:
    """Backward ends a layer with attention, after the experts, and with the first norm's vector."""
    return not bucket.decay, not bucket.routed


def _parts(program: Program) -> tuple[tuple[tuple[Part, ...], ...], ...]:
    """Of each unit of each chunk. Norms, biases, routers and embeddings are no linears, whose gradients alone can be put off; the
    final norm goes with the head."""
    last = max(((c, len(units) - 1) for c, units in enumerate(program.units)), key=lambda at: _is_end(program, at))
    places: dict[str, list[tuple[int, int]]] = {}
    for c, units in enumerate(program.units):
        for place, unit in enumerate(units):
            places.setdefault(unit, []).append((c, place))
    found: dict[tuple[int, int], list[Part]] = {at: [] for its in places.values() for at in its}
    for index, bucket in sorted(enumerate(program.buckets), key=lambda one: _last_in_layer(one[1])):
        if bucket.cuts == 1:
            continue
        counts: dict[tuple[int, int], list[int]] = {}
        for shard in bucket.shards:
            unit = unit_of(shard.name)
            for at in places.get(unit, [last]):
                is_linear = shard.gathered and not (unit == "embedding" and at[1] == 0)
                counts.setdefault(at, [0, 0])[is_linear] += 1
        for at, (first, second) in counts.items():
            found[at].append(Part(index, first, second))
    return tuple(tuple(tuple(found[c, p]) for p in range(len(units))) for c, units in enumerate(program.units))


def _is_end(program: Program, at: tuple[int, int]) -> tuple[bool, int]:
    """Whether the chunk holds the end of the model, which its head says."""
    pieces = program.chunks[at[0]]
    return pieces[-1][0].name == "head", at[0]
