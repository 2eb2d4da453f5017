"""The words of a pipeline schedule: for each stage, an ordered list of actions.

`cost/timeline.py` prices these lists, `parallel/pipeline.py` runs them, the report draws them.
Communication actions that follow one another form one batch: they are posted together, so that two neighbours
that send to each other at once do not wait for ever (NCCL matches sends and receives in posting order).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from operator import le


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward: the gradients of the input and of the weights."""
    BACKWARD_INPUT = "I"
    """The first half of a split backward: the gradient of the input, which the place before waits for."""
    BACKWARD_WEIGHT = "W"
    """The other half: the gradients of the weights, which nobody waits for (Qi et al. 2023, arXiv 2401.10241)."""
    SEND_FORWARD = "sF"
    """Send the chunk's output activation to the owner of the next place."""
    RECV_FORWARD = "rF"
    """Receive the chunk's input activation from the owner of the place before."""
    SEND_BACKWARD = "sB"
    """Send the gradient of the chunk's input to the owner of the place before."""
    RECV_BACKWARD = "rB"
    """Receive the gradient of the chunk's output from the owner of the next place."""

    __hash__ = (
        object.__hash__
    )  # Members are single objects; the hash of their names costs more than all that looks them up.

    @property
    def is_compute(self) -> bool:
        return self in COMPUTATIONS

    @property
    def is_send(self) -> bool:
        return self in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)

    @property
    def gives_input_gradient(self) -> bool:
        return self in (Kind.BACKWARD, Kind.BACKWARD_INPUT)

    @property
    def match(self) -> Kind:
        """The action of the other side that completes this communication."""
        return {
            Kind.SEND_FORWARD: Kind.RECV_FORWARD,
            Kind.RECV_FORWARD: Kind.SEND_FORWARD,
            Kind.SEND_BACKWARD: Kind.RECV_BACKWARD,
            Kind.RECV_BACKWARD: Kind.SEND_BACKWARD,
        }[self]


COMPUTATIONS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True)
class Action:
    """`chunk` is counted on the stage that acts, in communication too."""

    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")

    def of(self, kind: Kind, chunk: int | None = None) -> Action:
        """Another action on the same micro-batch and, unless said otherwise, the same chunk."""
        return act(kind, self.micro_batch, self.chunk if chunk is None else chunk)


@lru_cache(maxsize=2**17)
def act(kind: Kind, micro_batch: int, chunk: int = 0) -> Action:
    """An action: a search makes hundreds of thousands, few of which differ."""
    return Action(kind, micro_batch, chunk)


Seat = tuple[int, int]
"""(stage, chunk)."""

Placement = tuple[tuple[int, ...], ...]
"""`placement[stage][chunk]`: the chunk's place in the model, from 0 to stages * chunks - 1."""


@dataclass(frozen=True)
class Schedule:
    """`actions[stage]` is what that stage does, in order; `paired`, the pairs of `pairs.py` at the same time.

    Activations go from place to place of the model, gradients back. Between two places on one stage nothing is sent: the stage
    hands the tensor over to itself.
    """

    name: str
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: Placement
    paired: bool = False

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def chunks(self) -> int:
        return len(self.placement[0])

    @cached_property
    def splits_backward(self) -> bool:
        """Whether any backward is done in two halves."""
        return any(action.kind is Kind.BACKWARD_INPUT for actions in self.actions for action in actions)

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether the chunk holds the beginning of the model."""
        return self.placement[stage][chunk] == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether the chunk holds the end of the model."""
        return self.placement[stage][chunk] == self.stages * self.chunks - 1

    def before(self, stage: int, chunk: int) -> Seat | None:
        """Who holds the place before; None at the beginning of the model."""
        return self._seats.get(self.placement[stage][chunk] - 1)

    def after(self, stage: int, chunk: int) -> Seat | None:
        """Who holds the next place; None at the end of the model."""
        return self._seats.get(self.placement[stage][chunk] + 1)

    def counterpart(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """The stage and its action that complete the communication `action` of `stage`; None past either end of the model."""
        on = action.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        seat = self.after(stage, action.chunk) if on else self.before(stage, action.chunk)
        return None if seat is None else (seat[0], action.of(action.kind.match, seat[1]))

    def peer(self, stage: int, action: Action) -> int:
        """The stage that `action` of `stage` communicates with."""
        other = self.counterpart(stage, action)
        assert other is not None, f"{action} of stage {stage} leaves the model"
        return other[0]

    def in_flight(self, stage: int) -> int:
        """The most pairs of micro-batch and chunk whose activations the stage holds at once.

        They count until the gradient of the input is there; what the weights' gradients still need after that is `deferred`.
        """
        return _most(
            (action.kind is Kind.FORWARD) - action.kind.gives_input_gradient for action in self.actions[stage]
        )  # fmt: skip

    def deferred(self, stage: int) -> int:
        """The most pairs of micro-batch and chunk whose weight gradients are put off at once: I is done, W is not."""
        return _most(
            (action.kind is Kind.BACKWARD_INPUT) - (action.kind is Kind.BACKWARD_WEIGHT) for action in self.actions[stage]
        )

    def held(self, stage: int) -> int:
        """The most pairs of micro-batch and chunk of which the stage holds anything: in flight or deferred."""
        return _most(
            (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
            for action in self.actions[stage]
        )

    def peak(self, stage: int, sizes: Sequence[int], deferred: Sequence[int] | None = None) -> int:
        """The most that a stage holds at once, when a forward of chunk i keeps `sizes[i]`. A split backward keeps it until the
        weights' half is done, or `deferred[i]` where that is more: the inputs of the linears and the gradients of their outputs, which
        that half needs, whether they were kept or made again."""
        later = [max(pair) for pair in zip(sizes, deferred or sizes, strict=True)]
        return max(sum(n * size for n, size in zip(held, (*sizes, *later), strict=True)) for held in self._fullest(stage))

    def _fullest(self, stage: int) -> set[tuple[int, ...]]:
        """How many micro-batches the stage holds of each chunk, and of each chunk deferred, at every moment at which no other has as
        many of all of them: any of these may be the most, whatever the sizes."""
        if stage not in self._held:
            chunks, each = self.chunks, set[tuple[int, ...]]()
            held = [0] * 2 * chunks
            for action in self.actions[stage]:
                if action.kind is Kind.FORWARD:
                    held[action.chunk] += 1
                elif action.kind.gives_input_gradient:
                    held[action.chunk] -= 1
                    held[chunks + action.chunk] += action.kind is Kind.BACKWARD_INPUT
                elif action.kind is Kind.BACKWARD_WEIGHT:
                    held[chunks + action.chunk] -= 1
                each.add(tuple(held))
            self._held[stage] = set(_highest(each))
        return self._held[stage]

    def backwards(self, stage: int) -> Sequence[tuple[Kind, int, tuple[int, ...]]]:
        """(kind, chunk, held) of each backward and half of one: `held` counts the micro-batches of which the stage holds what a forward
        of each chunk left, then those of which it holds what the first half left, without the one of the action. Those beside which
        another of the same kind and chunk holds as many of all are left out."""
        if stage not in self._backwards:
            # As one number, of which each count is a digit: most moments repeat others.
            base, chunks = len(self.actions[stage]) + 1, range(self.chunks)
            one, put_off = ([base ** (at + chunk) for chunk in chunks] for at in (0, self.chunks))
            whole, inputs, weights = ([set[int]() for _ in chunks] for _ in range(3))
            held = 0
            for action in self.actions[stage]:
                kind, chunk = action.kind, action.chunk
                if kind is Kind.FORWARD:
                    held += one[chunk]
                elif kind is Kind.BACKWARD:
                    held -= one[chunk]
                    whole[chunk].add(held)
                elif kind is Kind.BACKWARD_INPUT:
                    held -= one[chunk]
                    inputs[chunk].add(held)
                    held += put_off[chunk]
                elif kind is Kind.BACKWARD_WEIGHT:
                    held -= put_off[chunk]
                    weights[chunk].add(held)
            each = {Kind.BACKWARD: whole, Kind.BACKWARD_INPUT: inputs, Kind.BACKWARD_WEIGHT: weights}
            self._backwards[stage] = [
                (kind, chunk, held)
                for kind, by_chunk in each.items()
                for chunk, its in enumerate(by_chunk)
                for held in _highest(tuple(number // digit % base for digit in (*one, *put_off)) for number in its)
            ]
        return self._backwards[stage]

    @cached_property
    def _backwards(self) -> dict[int, list[tuple[Kind, int, tuple[int, ...]]]]:
        return {}

    @cached_property
    def _held(self) -> dict[int, set[tuple[int, ...]]]:
        return {}

    @cached_property
    def _seats(self) -> dict[int, Seat]:
        return {
            place: (stage, chunk) for stage, places in enumerate(self.placement) for chunk, place in enumerate(places)
        }  # fmt: skip


def _highest(counts: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those beside which no other has as many of all."""
    out: list[tuple[int, ...]] = []
    for one in sorted(counts, key=sum, reverse=True):  # what is above another has the higher sum, and comes first
        if not any(all(map(le, one, other)) for other in out):
            out.append(one)
    return out


def _most(changes: Iterable[int]) -> int:
    """The highest value of a count that starts at zero."""
    count = most = 0
    for change in changes:
        count += change
        most = max(most, count)
    return most
