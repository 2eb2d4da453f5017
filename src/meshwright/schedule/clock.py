"""When each computation of a schedule runs, and who waits for whom when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from meshwright.schedule.actions import Action, Kind, Schedule
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
    forward, put_off = Kind.FORWARD, Kind.BACKWARD_WEIGHT
    work = [computations(schedule, stage) for stage in range(schedule.stages)]
    seats = [_seats(schedule, stage) for stage in range(schedule.stages)]
    at = [0] * schedule.stages
    # By direction, place and micro-batch: which computation it was.
    places = schedule.stages * schedule.chunks
    done = {on: [[-1] * schedule.micro_batches for _ in range(places)] for on in (True, False)}
    out: list[Waits] = []
    moved = True
    while moved:
        moved = False
        for stage, units in enumerate(work):
            first = at[stage]
            for unit in islice(units, first, None):
                began = len(out)
                for action in unit:
                    kind = action.kind
                    if kind is put_off:
                        out.append(Waits(stage, action, -1, False))
                        continue
                    on = kind is forward
                    source, travels = seats[stage][action.chunk][on]
                    index = done[on][source][action.micro_batch] if source is not None else -1
                    if source is not None and index < 0:
                        break
                    out.append(Waits(stage, action, index, travels, len(out) > began))
                else:
                    for number, action in enumerate(unit, began):
                        if action.kind is not put_off:
                            done[action.kind is forward][schedule.placement[stage][action.chunk]][action.micro_batch] = (
                                number
                            )
                    at[stage] += 1
                    continue
                del out[began:]  # of a pair, one can begin and the other cannot
                break
            moved = moved or at[stage] > first
    if any(at[stage] < len(units) for stage, units in enumerate(work)):
        raise _stuck(schedule, {stage: units[at[stage]] for stage, units in enumerate(work) if at[stage] < len(units)})
    return out


def _seats(schedule: Schedule, stage: int) -> list[dict[bool, tuple[int | None, bool]]]:
    """Of each chunk, forward (True) and backward: the place that it waits for, if any, and whether that is another stage's."""
    out: list[dict[bool, tuple[int | None, bool]]] = []
    for chunk, place in enumerate(schedule.placement[stage]):
        before, after = schedule.before(stage, chunk), schedule.after(stage, chunk)
        out.append(
            {
                True: (place - 1, before[0] != stage) if before is not None else (None, False),
                False: (place + 1, after[0] != stage) if after is not None else (None, False),
            }
        )
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
