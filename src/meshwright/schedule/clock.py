"""When each computation of a schedule runs, and who waits for whom when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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


def _waits(its: tuple[int, Action, int, bool, bool]) -> Waits:
    """Without the checks of a call by names: a search makes hundreds of thousands."""
    return tuple.__new__(Waits, its)


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
    orders, pairs = zip(*map(_in_line, work), strict=True)
    seats = _seats(schedule)
    at, out = [0] * schedule.stages, list[Waits]()
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            own, begins, first, here = seats[stage], pairs[stage], at[stage], at[stage]
            while here < len(order):
                action = order[here]
                seat = own[action.chunk][action.kind]
                source = seat.source[action.micro_batch] if seat.source is not None else -1
                if source < 0 and seat.source is not None:
                    break
                joins = here - 1 in begins
                if here in begins:  # of a pair, the other must be able to begin too
                    other = order[here + 1]
                    its = own[other.chunk][other.kind].source
                    if its is not None and its[other.micro_batch] < 0:
                        break
                seat.done[action.micro_batch] = len(out)
                out.append(_waits((stage, action, source, seat.travels, joins)))
                here += 1
            at[stage] = here
            moved = moved or here > first
    waiting = {stage: _unit_at(units, at[stage]) for stage, units in enumerate(work) if at[stage] < len(orders[stage])}
    if waiting:
        raise _stuck(schedule, waiting)
    return out


def _in_line(units: Sequence[Unit]) -> tuple[list[Action], frozenset[int]]:
    """The same one by one, and which of them begin a pair."""
    order, begins = list[Action](), set[int]()
    for unit in units:
        if len(unit) > 1:
            begins.add(len(order))
        order += unit
    return order, frozenset(begins)


def _unit_at(units: Sequence[Unit], at: int) -> Unit:
    """The unit that begins with the `at`-th computation."""
    starts = accumulate((len(unit) for unit in units), initial=0)
    return next(unit for unit, start in zip(units, starts, strict=False) if start == at)


@dataclass(frozen=True, slots=True)
class _Seat:
    """Of the computations of one kind of one chunk, by micro-batch: which turn they were (-1: not yet), and which turns they wait for."""

    source: list[int] | None
    travels: bool
    done: list[int]


def _seats(schedule: Schedule) -> list[list[dict[Kind, _Seat]]]:
    """[stage][chunk]."""
    # By place: forwards, and what gives the gradient of its input.
    on, back = ([[-1] * schedule.micro_batches for _ in range(schedule.stages * schedule.chunks)] for _ in range(2))
    out: list[list[dict[Kind, _Seat]]] = []
    for stage, places in enumerate(schedule.placement):
        out.append([])
        for chunk, place in enumerate(places):
            before, after = schedule.before(stage, chunk), schedule.after(stage, chunk)
            forward = _Seat(on[place - 1], before[0] != stage, on[place]) if before else _Seat(None, False, on[place])
            backward = _Seat(back[place + 1], after[0] != stage, back[place]) if after else _Seat(None, False, back[place])
            out[-1].append(
                {
                    Kind.FORWARD: forward,
                    Kind.BACKWARD: backward,
                    Kind.BACKWARD_INPUT: backward,
                    Kind.BACKWARD_WEIGHT: _Seat(None, False, [-1] * schedule.micro_batches),
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
