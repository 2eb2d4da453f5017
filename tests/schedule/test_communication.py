"""Where the sends and receives stand costs no time, though a stage's communications run one after the other."""

from __future__ import annotations

import sys
from functools import cache

import pytest
from schedule_cases import Shape

from meshwright.cost.timeline import ChunkSeconds, play
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches
from meshwright.schedule.orders import make_schedule

SECONDS = {Kind.FORWARD: 1, Kind.BACKWARD: 2, Kind.BACKWARD_INPUT: 1, Kind.BACKWARD_WEIGHT: 1}


def end_with_ordered_communication(schedule: Schedule) -> float:
    """The step under what one NCCL communicator does. A stage's batches of communications run in order; a batch begins after the
    computation in front of it and is through when the peers have begun theirs. A computation waits for its receive only."""
    work = [batches(actions) for actions in schedule.actions]
    batch_of = {
        (stage, action): at for stage, its in enumerate(work) for at, batch in enumerate(its) for action in batch
    }  # fmt: skip

    @cache
    def computed(stage: int, at: int) -> float:
        """When the last computation up to `at` ends."""
        if at < 0:
            return 0
        (action, *_) = work[stage][at]
        if not action.kind.is_compute:
            return computed(stage, at - 1)
        start = computed(stage, at - 1)
        receive = action.of(Kind.RECV_FORWARD if action.kind is Kind.FORWARD else Kind.RECV_BACKWARD)
        if action.kind is not Kind.BACKWARD_WEIGHT and (stage, receive) in batch_of:
            start = max(start, through(stage, batch_of[stage, receive]))
        return start + SECONDS[action.kind]

    @cache
    def begun(stage: int, at: int) -> float:
        before = next((i for i in range(at - 1, -1, -1) if not work[stage][i][0].kind.is_compute), None)
        return max(computed(stage, at - 1), 0 if before is None else through(stage, before))

    @cache
    def through(stage: int, at: int) -> float:
        return max(
            begun(stage, at), *(begun(peer, batch_of[peer, other]) for peer, other in _others(stage, work[stage][at]))
        )

    def _others(stage: int, batch: tuple[Action, ...]) -> list[tuple[int, Action]]:
        return [other for action in batch if (other := schedule.counterpart(stage, action))]

    return max(computed(stage, len(its) - 1) for stage, its in enumerate(work))


@pytest.mark.parametrize(
    "shape",
    [
        ("gpipe", 8, 16, 1),
        ("1f1b", 8, 16, 1),
        ("interleaved", 4, 8, 3),
        ("interleaved", 8, 32, 2),
        ("zb-h1", 8, 16, 1),
        ("zb-v", 8, 16, 2),
        ("dualpipe-v", 8, 16, 2),
    ],
    ids=str,
)
def test_the_order_of_communication_costs_nothing(shape: Shape) -> None:
    schedule = make_schedule(*shape)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        took = end_with_ordered_communication(schedule)
    finally:
        sys.setrecursionlimit(limit)
    chunk = ChunkSeconds(1, 2, 1)
    assert took == play(schedule, [[chunk] * schedule.chunks] * schedule.stages, send=0).end
