"""When each computation of a schedule runs, and who waits for whom when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from meshwright.schedule.actions import Action, Kind, Schedule, Seat
from meshwright.schedule.pairs import Unit, computations
from meshwright.spec.errors import UserError


class Turn(NamedTuple):
    """One computation of `stage`, from `start` to `end`; the two of a pair begin and end together."""

    stage: int
    action: Action
    start: float
    end: float


class Waits(NamedTuple):
    """One computation of `stage`, which waits for the computation before it there, and for the `source`-th of all (-1: for none),
    whose result `travels` if it is of another stage. One that `joins` is a pair with the entry before it: both wait for what either
    waits for."""

    stage: int
    action: Action
    source: int
    travels: bool
    joins: bool = False


def run_clock(
    schedule: Schedule,
    seconds: Callable[[int, Action], float],
    send: float = 0.0,
    wound: Sequence[Waits] | None = None,
    together: Callable[[int, Action, Action], float] | None = None,
) -> list[Turn]:
    """Each stage does its computations in order, as soon as their inputs are there; the turns of a stage come in its order.

    `seconds(stage, action)`: how long a computation takes; `send`: how long a tensor takes from stage to stage. Sends do not hold
    up the sender. `wound`: what `wind_clock` makes of the schedule, if it is at hand. `together(stage, forward, backward)`: how long a
    pair takes; by default as long as one after the other. Raises UserError when the stages wait for each other.
    """
    clock, turns = [0.0] * schedule.stages, list[Turn]()
    for stage, action, source, travels, joins in wound or wind_clock(schedule):
        ready = 0.0 if source < 0 else turns[source].end + (send if travels else 0.0)
        if joins:
            _, partner, began, ended = turns.pop()
            start = max(began, ready)
            both = together(stage, partner, action) if together else ended - began + seconds(stage, action)
            turns.append(Turn(stage, partner, start, start + both))
            end = start + both
        else:
            start = max(clock[stage], ready)
            end = start + seconds(stage, action)
        clock[stage] = end
        turns.append(Turn(stage, action, start, end))
    return turns


def wind_clock(schedule: Schedule) -> list[Waits]:
    """The computations of all stages in an order in which each comes after what it waits for.

    Raises UserError when the stages wait for each other.
    """
    work = [computations(schedule, stage) for stage in range(schedule.stages)]
    at = [0] * schedule.stages
    # By direction, place and micro-batch: which computation it was.
    done: dict[bool, list[dict[int, int]]] = {
        on: [{} for _ in range(schedule.stages * schedule.chunks)] for on in (True, False)
    }
    out: list[Waits] = []
    moved = True
    while moved:
        moved = False
        for stage, units in enumerate(work):
            seats = [
                (place, schedule.before(stage, chunk), schedule.after(stage, chunk))
                for chunk, place in enumerate(schedule.placement[stage])
            ]
            first = at[stage]
            for unit in islice(units, first, None):
                ready = _ready(stage, unit, seats, done)
                if len(ready) < len(unit):
                    break
                for waits in ready:
                    kind, micro_batch, chunk = waits.action.kind, waits.action.micro_batch, waits.action.chunk
                    if kind is not Kind.BACKWARD_WEIGHT:
                        done[kind is Kind.FORWARD][seats[chunk][0]][micro_batch] = len(out)
                    out.append(waits)
                at[stage] += 1
            moved = moved or at[stage] > first
    if any(at[stage] < len(units) for stage, units in enumerate(work)):
        raise _stuck(schedule, {stage: units[at[stage]] for stage, units in enumerate(work) if at[stage] < len(units)})
    return out


def _ready(
    stage: int,
    unit: Unit,
    seats: Sequence[tuple[int, Seat | None, Seat | None]],
    done: Mapping[bool, Sequence[Mapping[int, int]]],
) -> list[Waits]:
    """What the computations of a unit wait for, up to the first whose source is not done."""
    out: list[Waits] = []
    for action in unit:
        index, travels = -1, False
        if action.kind is not Kind.BACKWARD_WEIGHT:
            forward = action.kind is Kind.FORWARD
            place, before, after = seats[action.chunk]
            source, there = (before, place - 1) if forward else (after, place + 1)
            if source is not None:
                index, travels = done[forward][there].get(action.micro_batch, -1), source[0] != stage
                if index < 0:
                    break
        out.append(Waits(stage, action, index, travels, joins=len(out) > 0))
    return out


def _stuck(schedule: Schedule, waiting: Mapping[int, Unit]) -> UserError:
    """The refusal of units of which none can begin; of a pair, the half that waits for a stage that waits too."""
    stuck = {}
    for stage, unit in waiting.items():
        each = [(action, source_of(schedule, stage, action)) for action in unit]
        stuck[stage] = next((one for one in each if one[1] is not None and one[1][0] in waiting), each[0])
    return deadlock(schedule, stuck)


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
