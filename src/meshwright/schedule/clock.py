"""When each computation of a schedule runs, and who waits for whom when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.spec.errors import UserError


class Turn(NamedTuple):
    """One computation of `stage`, from `start` to `end`."""

    stage: int
    action: Action
    start: float
    end: float


class Waits(NamedTuple):
    """One computation of `stage`, which waits for the computation before it there, and for the `source`-th of all (-1: for none),
    whose result `travels` if it is of another stage."""

    stage: int
    action: Action
    source: int
    travels: bool


def run_clock(
    schedule: Schedule,
    seconds: Callable[[int, Action], float],
    send: float = 0.0,
    wound: Sequence[Waits] | None = None,
) -> list[Turn]:
    """Each stage does its computations in order, as soon as their inputs are there; the turns of a stage come in its order.

    `seconds(stage, action)`: how long a computation takes; `send`: how long a tensor takes from stage to stage. Sends do not hold
    up the sender. `wound`: what `wind_clock` makes of the schedule, if it is at hand. Raises UserError when the stages wait for each
    other.
    """
    clock, turns = [0.0] * schedule.stages, list[Turn]()
    for stage, action, source, travels in wound or wind_clock(schedule):
        ready = 0.0 if source < 0 else turns[source].end + (send if travels else 0.0)
        start = max(clock[stage], ready)
        clock[stage] = end = start + seconds(stage, action)
        turns.append(Turn(stage, action, start, end))
    return turns


def wind_clock(schedule: Schedule) -> list[Waits]:
    """The computations of all stages in an order in which each comes after what it waits for.

    Raises UserError when the stages wait for each other.
    """
    computes = [[a for a in actions if a.kind.is_compute] for actions in schedule.actions]
    at = [0] * schedule.stages
    # By direction, place and micro-batch: which computation it was.
    done: dict[bool, list[dict[int, int]]] = {
        on: [{} for _ in range(schedule.stages * schedule.chunks)] for on in (True, False)
    }
    out: list[Waits] = []
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(computes):
            seats = [
                (place, schedule.before(stage, chunk), schedule.after(stage, chunk))
                for chunk, place in enumerate(schedule.placement[stage])
            ]
            first = at[stage]
            for action in islice(actions, first, None):
                kind, micro_batch = action.kind, action.micro_batch
                place, before, after = seats[action.chunk]
                index, travels = -1, False
                if kind is not Kind.BACKWARD_WEIGHT:
                    forward = kind is Kind.FORWARD
                    source, there = (before, place - 1) if forward else (after, place + 1)
                    if source is not None:
                        index, travels = done[forward][there].get(micro_batch, -1), source[0] != stage
                        if index < 0:
                            break
                    done[forward][place][micro_batch] = len(out)
                out.append(Waits(stage, action, index, travels))
                at[stage] += 1
            moved = moved or at[stage] > first
    stuck = {stage: actions[at[stage]] for stage, actions in enumerate(computes) if at[stage] < len(actions)}
    if stuck:
        raise deadlock(schedule, {stage: (action, source_of(schedule, stage, action)) for stage, action in stuck.items()})
    return out


def source_of(schedule: Schedule, stage: int, action: Action) -> tuple[int, int] | None:
    """(stage, chunk) whose output or gradient the computation takes in; None: it needs only what it has."""
    if action.kind is Kind.FORWARD:
        return schedule.before(stage, action.chunk)
    if action.kind.gives_input_gradient:
        return schedule.after(stage, action.chunk)
    return None


def deadlock(schedule: Schedule, stuck: Mapping[int, tuple[Action, tuple[int, object] | None]]) -> UserError:
    """The refusal that names the stages that wait for each other: all the others wait for these.

    `stuck[stage]`: what the stage waits in, and the stage that it waits for.
    """
    path = [min(stuck)]
    while (source := stuck[path[-1]][1]) and source[0] in stuck and source[0] not in path:
        path.append(source[0])
    root = path[path.index(source[0]) :] if source and source[0] in path else path[-1:]
    where = "; ".join(f"stage {stage} waits in {stuck[stage][0]}" for stage in sorted(root))
    return UserError(f"schedule {schedule.name} deadlocks: {where}")
