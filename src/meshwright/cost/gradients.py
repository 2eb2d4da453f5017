"""The buffers in which gradients are whole until they are reduced, from ZeRO-2 on (`parallel/bucket.py`, `parallel/data.py`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from meshwright.cost.program import Program
from meshwright.cost.units import UnitElements, unit_buffer_bytes
from meshwright.schedule.actions import Kind, Schedule
from meshwright.schedule.buckets import unit_of
from meshwright.spec.layout import Layout
from meshwright.spec.precision import WIDTH, StateDtypes

IN_FLIGHT = 2
"""Reductions under way at once; more than two buffers of a bucket's size are in use while a third one is filled."""
STEADY = 3
"""Micro-batches on one chunk after which nothing changes any more."""


class Part(NamedTuple):
    """Gradients of a unit that follow one another into the same bucket, in the order of backward. `is_second`: of linears, whose
    gradients come with the second half of a split backward."""

    bucket: int
    number: int
    is_second: bool


class GradientBuffers:
    """The buffers that ranks with this program keep for gradients, beyond those that they have for the parameters of units."""

    def __init__(self, program: Program, layout: Layout):
        self.buckets, self.is_used = program.buckets, layout.zero >= 2 and any(b.cuts > 1 for b in program.buckets)
        if not self.is_used:
            return
        gradient = StateDtypes.of(layout).gradient
        shared = gradient == layout.precision
        self.width = WIDTH[gradient]
        self.parameters = UnitElements(program, layout) if shared else None
        self.free = unit_buffer_bytes(program, layout) if shared else 0
        self.units, self.parts = program.units, _parts(program)
        self.expected = [0] * len(self.buckets)
        for chunk in self.parts:
            for parts in chunk:
                for part in parts:
                    self.expected[part.bucket] += part.number

    def bytes_of(self, schedule: Schedule, stage: int) -> int:
        """Of a rank of `stage` when a step is over."""
        if not self.is_used:
            return 0
        filling, done = _Filling(self), [0] * schedule.chunks
        for action in schedule.actions[stage]:
            if action.kind is Kind.FORWARD:
                filling.forward(action.chunk)
            elif action.kind is Kind.BACKWARD_WEIGHT:
                filling.weights(action.chunk)
            elif action.kind.gives_input_gradient:
                filling.backward(action.chunk, split=action.kind is Kind.BACKWARD_INPUT)
            if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
                done[action.chunk] += 1
                if min(done) >= STEADY:
                    break
        most = sum(numel * count for numel, count in filling.most.items())
        return max(0, self.width * most - self.free)


class _Filling:
    """The same while passes fill them. `most`: of each number of elements, how many buffers there are.

    A bucket is whole from the first of its gradients until its reduction is over, which is waited for when a third one is to start;
    from its second reduction on, what that leaves here is added to what is kept, out of one more buffer. Several chunks may fill a bucket
    together; it is reduced when as many gradients are in as one micro-batch gives on all of them. Buffers are kept for the next of the same
    size and dtype, whether of parameters or of gradients.
    """

    def __init__(self, of: GradientBuffers):
        self._of, self._missing = of, list(of.expected)
        self.most: dict[int, int] = {}
        self._whole: Counter[int] = Counter()
        self._under_way: deque[tuple[int, ...]] = deque()
        self._reduced: set[int] = set()

    def forward(self, chunk: int) -> None:
        """Where gradients are of the same dtype, the parameters of units take their buffers between two backwards."""
        if self._of.parameters is None:
            return
        units = self._of.units[chunk]
        for unit, coming in zip(units, (*units[1:], None), strict=True):
            self._count(self._of.parameters.forward(unit, coming))

    def backward(self, chunk: int, *, split: bool) -> None:
        """A whole one, or the first half of one that is split."""
        units = self._of.units[chunk]
        for place in reversed(range(len(units))):
            here: Counter[int] = Counter()
            if self._of.parameters is not None:
                here = self._of.parameters.backward(units[place], place, units[place - 1] if place else None)
                self._count(here)
            for part in self._of.parts[chunk][place]:
                if not (split and part.is_second):
                    self._add(part, here)

    def weights(self, chunk: int) -> None:
        """The second half of a split backward."""
        for parts in self._of.parts[chunk][::-1]:
            for part in parts:
                if part.is_second:
                    self._add(part, Counter())

    def _add(self, part: Part, parameters: Counter[int]) -> None:
        at, left = part.bucket, part.number
        while left > 0:
            self._take(at)
            now = min(left, self._missing[at])
            left -= now
            self._missing[at] -= now
            if self._missing[at] == 0:
                self._count(parameters)
                self._reduce(at)
            self._count(parameters)

    def _take(self, at: int) -> None:
        if self._missing[at] == self._of.expected[at]:
            self._whole[self._of.buckets[at].numel] += 1

    def _reduce(self, at: int) -> None:
        while len(self._under_way) >= IN_FLIGHT:
            self._whole.subtract(self._under_way.popleft())
        bucket = self._of.buckets[at]
        part = (bucket.owned,) if at in self._reduced else ()
        self._reduced.add(at)
        self._whole.update(part)
        self._under_way.append((bucket.numel, *part))
        self._missing[at] += self._of.expected[at]

    def _count(self, parameters: Counter[int]) -> None:
        in_use = self._whole
        if parameters:
            in_use = in_use + parameters
        for numel, count in in_use.items():
            if count > self.most.get(numel, 0):
                self.most[numel] = count


_LAYER = (
    "moe.shared.down",
    "moe.shared.gate_up.gate",
    "moe.shared.gate_up.up",
    "moe.experts.down",
    "moe.experts.gate_up.up",
    "moe.experts.gate_up.gate",
    "moe.router",
    "mlp.down",
    "mlp.gate_up.gate",
    "mlp.gate_up.up",
    "mlp_norm",
    "attention.out",
    "attention.sinks",
    "attention.kv_up",
    "attention.kv_down_norm",
    "attention.kv_down",
    "attention.q_up",
    "attention.q_down_norm",
    "attention.q_down",
    "attention.q",
    "attention.k_norm",
    "attention.q_norm",
    "attention.qkv.q",
    "attention.qkv.k",
    "attention.qkv.v",
    "attention_norm",
)
"""In the order of backward: from the last to the first, but for the products of one input, which are computed as in forward."""
_ENDS = ("head", "embedding.positions", "embedding.tokens", "norm")
_TURN = {module: turn for turn, module in enumerate((*_ENDS, *_LAYER))}


@cache
def turn_of(name: str) -> int:
    """When the gradient of a unit's parameter comes."""
    module = name.rsplit(".", 1)[0] if not name.endswith(".sinks") else name
    return _TURN[module.split(".", 2)[2] if module.startswith("layers.") else module]


def _parts(program: Program) -> tuple[tuple[tuple[Part, ...], ...], ...]:
    """Of each unit of each chunk. Norms, biases, routers and embeddings are no linears, whose gradients alone can be put off; the
    final norm goes with the head."""
    last = max(((c, len(units) - 1) for c, units in enumerate(program.units)), key=lambda at: _is_end(program, at))
    places: dict[str, list[tuple[int, int]]] = {}
    for c, units in enumerate(program.units):
        for place, unit in enumerate(units):
            places.setdefault(unit, []).append((c, place))
    found: dict[tuple[int, int], list[tuple[int, Part]]] = {at: [] for its in places.values() for at in its}
    for index, bucket in enumerate(program.buckets):
        if bucket.cuts == 1:
            continue
        for shard in bucket.shards:
            unit, turn = unit_of(shard.name), turn_of(shard.name)
            for at in places.get(unit, [last]):
                if unit == "embedding" and at[1] > 0 and turn != _TURN["embedding.tokens"]:
                    continue  # at the head, of a tied embedding there are the tokens alone
                is_linear = shard.gathered and not (unit == "embedding" and at[1] == 0)
                found[at].append((turn, Part(index, 1, is_linear)))
    return tuple(tuple(tuple(_joined(found[c, p])) for p in range(len(units))) for c, units in enumerate(program.units))


def _joined(parts: list[tuple[int, Part]]) -> Iterator[Part]:
    """In their order, neighbours of one bucket as one."""
    in_order = (part for _, part in sorted(parts, key=itemgetter(0)))
    for (bucket, is_second), its in groupby(in_order, key=lambda part: (part.bucket, part.is_second)):
        yield Part(bucket, sum(part.number for part in its), is_second)


def _is_end(program: Program, at: tuple[int, int]) -> tuple[bool, int]:
    """Whether the chunk holds the end of the model, which its head says."""
    pieces = program.chunks[at[0]]
    return pieces[-1][0].name == "head", at[0]
