"""Puts the sends and receives into a schedule that only says what is computed: one rule for every order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from meshwright.schedule.actions import Action, Kind, Placement, Schedule
from meshwright.schedule.clock import run_clock

Gaps = list[list[Action]]
"""What stands before each of a stage's computations, and after the last."""


def with_communication(
    name: str, micro_batches: int, orders: Sequence[Sequence[Action]], placement: Placement, paired: bool = False
) -> Schedule:
    """The schedule that computes `orders[stage]` in order. Raises UserError where the stages would wait for each other.

    A tensor is sent right after it was computed. Its receive is posted at the last moment between two computations of the receiver
    that is not after that, going by a clock on which a forward takes one step and a backward two. So a tensor travels under
    computations that do not need it, and no send waits long: communications on one group run in the order of posting, and each
    that waits holds up those behind it.

    Such a schedule cannot deadlock, even where a stage stops in each batch of communications until all of it is through. Suppose
    it did, and take of the stages that stopped the one, A, whose next computation ends first on the clock. Whatever A waits for
    happens before that end, so its peer stopped before it got there, and has a next computation that ends still earlier.
    Tensors from one stage to another are received in the order in which they are sent, because both follow the clock.

    The two of a pair begin and end together, as one computation, so all this holds for them, and nothing stands between the two.
    """
    plan = Schedule(name, micro_batches, tuple(map(tuple, orders)), placement, paired)
    # A split schedule is drawn for forward, input and weight gradient of equal length, and its few whole backwards beside them
    # fit that grid best.
    backward = 1.0 if plan.splits_backward else 2.0
    turns = run_clock(plan, lambda _, action: backward if action.kind is Kind.BACKWARD else 1.0)
    ends: list[list[float]] = [[0.0] for _ in orders]
    for turn in turns:
        ends[turn.stage].append(turn.end)
    sends: list[Gaps] = [[[] for _ in times] for times in ends]
    receives: list[Gaps] = [[[] for _ in times] for times in ends]
    for stage, action, _, end in sorted(turns, key=lambda turn: turn.end):
        send = _send(plan, stage, action)
        if send is not None and (other := plan.counterpart(stage, send)):
            peer, receive = other
            sends[stage][bisect_right(ends[stage], end) - 1].append(send)
            receives[peer][bisect_right(ends[peer], end) - 1].append(receive)
    actions = tuple(tuple(_merge(*parts)) for parts in zip(plan.actions, sends, receives, strict=True))
    return Schedule(name, micro_batches, actions, placement, paired)


def _send(schedule: Schedule, stage: int, action: Action) -> Action | None:
    """What the stage sends after this computation; None where nobody or the stage itself goes on with it."""
    if action.kind is Kind.FORWARD:
        seat, kind = schedule.after(stage, action.chunk), Kind.SEND_FORWARD
    elif action.kind.gives_input_gradient:
        seat, kind = schedule.before(stage, action.chunk), Kind.SEND_BACKWARD
    else:
        return None
    return None if seat is None or seat[0] == stage else action.of(kind)


def _merge(order: Sequence[Action], sends: Gaps, receives: Gaps) -> list[Action]:
    out: list[Action] = []
    for i in range(len(order) + 1):
        out += sends[i] + receives[i] + list(order[i : i + 1])
    return out
