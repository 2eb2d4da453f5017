"""When each computation of a schedule runs, and who waits for whom when it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from meshwright.schedule.actions import COMPUTATIONS, Action, Kind, Schedule, act
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
    waits for. All of a kind on one chunk of a stage have the same `work` (see `work_number`)."""

    stage: int
    action: Action
    source: int
    travels: bool
    joins: bool
    work: int


def work_number(stage: int, chunk: int, kind: Kind, chunks: int) -> int:
    """Of a computation of `kind` on that chunk of that stage, of stages with so many `chunks`: where its seconds are in a list of all."""
    return (stage * chunks + chunk) * len(COMPUTATIONS) + COMPUTATIONS.index(kind)


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
    for stage, action, source, travels, joins, _ in wound or wind_clock(schedule):
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
    orders, pairs = zip(*(_in_line(schedule, stage) for stage in range(schedule.stages)), strict=True)
    seats = _seats(schedule)
    at, out, turn = [0] * schedule.stages, list[Waits](), tuple.__new__  # without the checks of a call by names
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            own, begins, first, here = seats[stage], pairs[stage], at[stage], at[stage]
            while here < len(order):
                action = order[here]
                waits, travels, done, work = own[action.chunk][action.kind]
                source = -1
                if waits is not None:
                    source = waits[action.micro_batch]
                    if source < 0:
                        break
                if here in begins:  # of a pair, the other must be able to begin too
                    other = order[here + 1]
                    its = own[other.chunk][other.kind].source
                    if its is not None and its[other.micro_batch] < 0:
                        break
                done[action.micro_batch] = len(out)
                out.append(turn(Waits, (stage, action, source, travels, here - 1 in begins, work)))
                here += 1
            at[stage] = here
            moved = moved or here > first
    waiting = {stage: here for stage, here in enumerate(at) if here < len(orders[stage])}
    if waiting:
        raise _stuck(schedule, {stage: _unit_at(computations(schedule, stage), here) for stage, here in waiting.items()})
    return out


def _in_line(schedule: Schedule, stage: int) -> tuple[Sequence[Action], frozenset[int]]:
    """What the stage computes, one by one, and which of them begin a pair."""
    if not schedule.paired:
        return [action for action in schedule.actions[stage] if action.kind in COMPUTATIONS], frozenset()
    order, begins = list[Action](), set[int]()
    for unit in computations(schedule, stage):
        if len(unit) > 1:
            begins.add(len(order))
        order += unit
    return order, frozenset(begins)


def _unit_at(units: Sequence[Unit], at: int) -> Unit:
    """The unit that begins with the `at`-th computation."""
    starts = accumulate((len(unit) for unit in units), initial=0)
    return next(unit for unit, start in zip(units, starts, strict=False) if start == at)


class _Seat(NamedTuple):
    """Of the computations of one kind of one chunk, by micro-batch: which turns they wait for, and which turn they were (-1: not yet)."""

    source: list[int] | None
    travels: bool
    done: list[int]
    work: int


def _seats(schedule: Schedule) -> list[list[dict[Kind, _Seat]]]:
    """[stage][chunk]."""
    # By place: forwards, and what gives the gradient of its input.
    on, back = ([[-1] * schedule.micro_batches for _ in range(schedule.stages * schedule.chunks)] for _ in range(2))

    def seat(stage: int, chunk: int, kind: Kind) -> _Seat:
        place, work = schedule.placement[stage][chunk], work_number(stage, chunk, kind, schedule.chunks)
        if kind is Kind.BACKWARD_WEIGHT:
            return _Seat(None, False, [-1] * schedule.micro_batches, work)
        done, step = (on, -1) if kind is Kind.FORWARD else (back, 1)
        source = source_of(schedule, stage, act(kind, 0, chunk))
        if source is None:
            return _Seat(None, False, done[place], work)
        return _Seat(done[place + step], source[0] != stage, done[place], work)

    return [
        [{kind: seat(stage, chunk, kind) for kind in COMPUTATIONS} for chunk in range(schedule.chunks)]
        for stage in range(schedule.stages)
    ]


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
