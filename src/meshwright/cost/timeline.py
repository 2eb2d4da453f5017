"""Plays a schedule with real durations: when every stage computes, and when it waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.schedule.actions import Kind, Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """One computation: `kind` of `micro_batch` on `stage` from `start` to `end` seconds."""

    stage: int
    kind: Kind
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    spans: tuple[Span, ...]
    stages: int

    @property
    def end(self) -> float:
        return max(span.end for span in self.spans)

    def busy(self, stage: int) -> float:
        return sum(span.end - span.start for span in self.spans if span.stage == stage)

    @property
    def bubble(self) -> float:
        """Share of stage-time in which no stage computes: 1 - busy / (stages * end)."""
        return 1 - sum(self.busy(stage) for stage in range(self.stages)) / (self.stages * self.end)


def play(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], send: float) -> Timeline:
    """`forward[stage]` and `backward[stage]` seconds of one micro-batch; `send` seconds from a stage to its neighbour.

    Sends do not hold up the sender; a computation waits for the arrival of its input.
    """
    duration = {Kind.FORWARD: forward, Kind.BACKWARD: backward}
    computes = [[a for a in actions if a.kind.is_compute] for actions in schedule.actions]
    at, clock = [0] * schedule.stages, [0.0] * schedule.stages
    done: dict[tuple[int, Kind, int], float] = {}
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(computes):
            while at[stage] < len(actions):
                action = actions[at[stage]]
                source = stage - 1 if action.kind is Kind.FORWARD else stage + 1
                ready = 0.0
                if 0 <= source < schedule.stages:
                    finished = done.get((source, action.kind, action.micro_batch))
                    if finished is None:
                        break
                    ready = finished + send
                start = max(clock[stage], ready)
                end = start + duration[action.kind][stage]
                clock[stage] = done[stage, action.kind, action.micro_batch] = end
                spans.append(Span(stage, action.kind, action.micro_batch, start, end))
                at[stage] += 1
                moved = True
    return Timeline(tuple(spans), schedule.stages)
