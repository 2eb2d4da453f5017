"""The schedules themselves: GPipe and 1F1B."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.spec.errors import UserError, choices
from meshwright.spec.layout import Layout


@lru_cache(maxsize=256)
def make_schedule(name: str, stages: int, micro_batches: int) -> Schedule:
    """The action lists of the named schedule. Raises UserError for a name without one."""
    if micro_batches < 1:
        raise UserError(f"a schedule needs at least 1 micro-batch, got {micro_batches}")
    if name not in _ORDERS:
        raise choices(name, _ORDERS, "pipeline schedule")
    actions = tuple(tuple(_ORDERS[name](stage, stages, micro_batches)) for stage in range(stages))
    return Schedule(name, micro_batches, actions)


def layout_schedule(layout: Layout, micro_batches: int) -> Schedule:
    """The schedule a layout runs; without a pipeline, forward and backward of each micro-batch in turn."""
    return make_schedule(layout.schedule, layout.pp, micro_batches)


def peak_in_flight(name: str, stage: int, stages: int, micro_batches: int) -> int:
    """`Schedule.in_flight` in closed form, for pricing many layouts."""
    return micro_batches if name == "gpipe" else min(micro_batches, stages - stage)


def _gpipe(stage: int, stages: int, m: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)."""
    out: list[Action] = []
    for i in range(m):
        out += _forward(i, stage, stages)
    for i in range(m):
        out += _backward(i, stage, stages)
    return out


def _one_forward_one_backward(stage: int, stages: int, m: int) -> list[Action]:
    """PipeDream-flush (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1).

    After `stages - 1 - stage` warm-up forwards, forwards and backwards alternate, so a stage never holds more than
    `stages - stage` micro-batches. Neighbours exchange both directions in one batch of sends and receives.
    """
    first, last = stage == 0, stage == stages - 1
    warm_up = min(m, stages - 1 - stage)
    out: list[Action] = []
    for i in range(warm_up):
        out += _forward(i, stage, stages)
    steady = m - warm_up
    if steady and not first:
        out.append(Action(Kind.RECV_FORWARD, warm_up))
    for i in range(steady):
        out.append(Action(Kind.FORWARD, warm_up + i))
        if not last:
            out += [Action(Kind.SEND_FORWARD, warm_up + i), Action(Kind.RECV_BACKWARD, i)]
        out.append(Action(Kind.BACKWARD, i))
        if not first:
            out.append(Action(Kind.SEND_BACKWARD, i))
            if i < steady - 1:
                out.append(Action(Kind.RECV_FORWARD, warm_up + i + 1))
    for i in range(steady, m):
        out += _backward(i, stage, stages)
    return out


def _forward(i: int, stage: int, stages: int) -> list[Action]:
    out = [Action(Kind.FORWARD, i)]
    if stage > 0:
        out.insert(0, Action(Kind.RECV_FORWARD, i))
    if stage < stages - 1:
        out.append(Action(Kind.SEND_FORWARD, i))
    return out


def _backward(i: int, stage: int, stages: int) -> list[Action]:
    out = [Action(Kind.BACKWARD, i)]
    if stage < stages - 1:
        out.insert(0, Action(Kind.RECV_BACKWARD, i))
    if stage > 0:
        out.append(Action(Kind.SEND_BACKWARD, i))
    return out


_ORDERS: dict[str, Callable[[int, int, int], list[Action]]] = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward}
