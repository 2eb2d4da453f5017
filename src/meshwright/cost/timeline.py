"""Plays a schedule with real durations: when every stage computes, and when it waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from meshwright.schedule.actions import COMPUTATIONS, Action, Kind, Schedule
from meshwright.schedule.clock import Waits, run_clock, source_of, wind_clock
from meshwright.schedule.pairs import computations

HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
UNASKED = "a split backward needs the seconds of the weight gradients"


@dataclass(frozen=True, slots=True)
class ChunkSeconds:
    """Seconds of one micro-batch on one chunk."""

    forward: float
    backward: float
    """The whole backward."""
    weight: float | None = None
    """The part of the backward that a split backward puts off; None where no schedule asks for it."""
    forward_apart: float = 0.0
    """Of the forward, what the other pass of a pair can compute under: it sends, and computes nothing."""
    backward_apart: float = 0.0
    beside: float = 1.0
    """Of what runs under the other pass: what that one loses to it."""

    def of(self, kind: Kind) -> float:
        if kind is Kind.FORWARD:
            return self.forward
        if kind is Kind.BACKWARD:
            return self.backward
        assert self.weight is not None, UNASKED
        return self.weight if kind is Kind.BACKWARD_WEIGHT else self.backward - self.weight


def together(forward: ChunkSeconds, backward: ChunkSeconds) -> float:
    """Seconds of a pair: a forward of one chunk and a backward of another, begun at once.

    No shorter than either pass alone, than what the two compute, and than what the two send over the same links; and no longer than
    one after the other. Between these bounds the two passes are taken to fit perfectly, but for what they take from each other.
    """
    alone = forward.forward, backward.backward
    apart = forward.forward_apart, backward.backward_apart
    least = max(*alone, sum(alone) - sum(apart), sum(apart))
    return least + min(1.0, backward.beside) * (sum(alone) - least)


@dataclass(frozen=True, slots=True)
class Span:
    """One computation: `kind` of `micro_batch` on `chunk` of `stage` from `start` to `end` seconds. The two of a pair have the same."""

    stage: int
    kind: Kind
    micro_batch: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`seconds[stage][chunk]` of one micro-batch. Its spans are made when they are asked for."""

    micro_batches: int
    seconds: Sequence[Sequence[ChunkSeconds]]
    send: float
    end: float
    whole: Callable[[], tuple[Schedule, Sequence[Waits]]] = field(repr=False, compare=False)
    """The schedule, and what `wind_clock` makes of it."""

    @property
    def stages(self) -> int:
        return len(self.seconds)

    @property
    def schedule(self) -> Schedule:
        return self.whole()[0]

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        schedule, wound = self.whole()
        turns = run_clock(
            schedule,
            lambda stage, action: self.seconds[stage][action.chunk].of(action.kind),
            self.send,
            wound,
            lambda stage, forward, backward: together(
                self.seconds[stage][forward.chunk], self.seconds[stage][backward.chunk]
            ),
        )
        return tuple(Span(t.stage, t.action.kind, t.action.micro_batch, t.action.chunk, t.start, t.end) for t in turns)

    def busy(self, stage: int) -> float:
        """Seconds in which the stage computes, or waits for what a pass itself sends."""
        each = sum(chunk.forward + chunk.backward for chunk in self.seconds[stage])
        return self.micro_batches * each - self.hidden(stage)

    def hidden(self, stage: int) -> float:
        """Seconds by which pairs are shorter than their passes one after the other."""
        seconds = self.seconds[stage]
        if not any(chunk.forward_apart or chunk.backward_apart for chunk in seconds):
            return 0.0
        pairs = [(seconds[u[0].chunk], seconds[u[1].chunk]) for u in computations(self.schedule, stage) if len(u) > 1]
        return sum(f.forward + b.backward - together(f, b) for f, b in pairs)

    def idle(self, stage: int) -> float:
        """Seconds in which the stage waits between its first computation and its last.

        The papers on zero bubbles count this: a stage that starts late and ends as much later loses nothing to the next step.
        """
        its = [span for span in self.spans if span.stage == stage]
        return max(span.end for span in its) - min(span.start for span in its) - self.busy(stage)

    @property
    def bubble(self) -> float:
        """Share of stage-time in which no stage computes: 1 - busy / (stages * end)."""
        return max(0.0, 1 - sum(self.busy(stage) for stage in range(self.stages)) / (self.stages * self.end))


def play(schedule: Schedule, seconds: Sequence[Sequence[ChunkSeconds]], send: float) -> Timeline:
    """`seconds[stage][chunk]` of one micro-batch; `send` seconds from a stage to another.

    Sends do not hold up the sender; a computation waits for the arrival of its input. What a stage hands over to itself is there
    at once.
    """
    wound = wind_clock(schedule)
    end = max(play_ends(wound, seconds, send))
    return Timeline(schedule.micro_batches, seconds, send, end, lambda: (schedule, wound))


def play_ends(turns: Sequence[Waits], seconds: Sequence[Sequence[ChunkSeconds]], send: float) -> list[float]:
    """When each computation of a wound schedule ends."""
    each = _in_order(seconds)
    clock, ends = [0.0] * len(seconds), list[float]()
    start, forward = 0.0, None
    for stage, action, source, travels, joins, work in turns:
        if not joins:
            start = clock[stage]
        if source >= 0:
            ready = ends[source] + send if travels else ends[source]
            if ready > start:
                start = ready
        if joins:  # the pair begins when both halves can
            assert forward is not None
            end = start + together(seconds[stage][forward.chunk], seconds[stage][action.chunk])
            ends[-1] = end
        else:
            end = start + each[work]
        clock[stage], forward = end, action
        ends.append(end)
    assert max(clock) < inf, UNASKED
    return ends


def _in_order(seconds: Sequence[Sequence[ChunkSeconds]]) -> list[float]:
    """Of every computation, by `work_number`; infinite where nobody asked how long the halves of a backward take."""
    return [
        inf if chunk.weight is None and kind in HALVES else chunk.of(kind)
        for chunks in seconds
        for chunk in chunks
        for kind in COMPUTATIONS
    ]


def lockstep_utilisation(schedule: Schedule) -> list[float]:
    """The share of stages that do anything, by time step, when a stage may do one forward and one backward in the same step.

    This is the convention behind the utilisation figures that are often shown, 25, 50, 75, 100, 75, 75, 100, 75, 50, 25 % for 4
    stages and 4 micro-batches. A result is there for other stages in the next step; the end of the model runs a micro-batch
    backward in the step of its forward. Forwards keep their order, and backwards theirs, but neither waits for the other, so
    GPipe and 1F1B look alike. That is not how a device spends its time, since it does one thing at a time: see `play`.
    Weight gradients of a split backward count with the backwards.
    """
    waiting = [
        [[a for a in actions if a.kind.is_compute and (a.kind is Kind.FORWARD) == forward] for forward in (True, False)]
        for actions in schedule.actions
    ]
    done: dict[tuple[int, int, bool], int] = {}
    shares: list[float] = []
    while any(queue for queues in waiting for queue in queues):
        step, active = len(shares), set()
        for forward in (True, False):
            for stage, queues in enumerate(waiting):
                queue = queues[not forward]
                if queue and _is_ready(schedule, stage, queue[0], done, step):
                    action = queue.pop(0)
                    if action.kind is not Kind.BACKWARD_WEIGHT:
                        done[schedule.placement[stage][action.chunk], action.micro_batch, forward] = step
                    active.add(stage)
        shares.append(len(active) / schedule.stages)
    return shares


def _is_ready(schedule: Schedule, stage: int, action: Action, done: dict[tuple[int, int, bool], int], step: int) -> bool:
    """Whether the input of `action` was there before `step`, and its own forward not after it."""
    forward, place = action.kind is Kind.FORWARD, schedule.placement[stage][action.chunk]
    if not forward and (place, action.micro_batch, True) not in done:
        return False
    source = source_of(schedule, stage, action)
    if source is None:
        return True
    return done.get((schedule.placement[source[0]][source[1]], action.micro_batch, forward), step) < step
