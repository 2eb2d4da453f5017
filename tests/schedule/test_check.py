"""The checker refuses what cannot run, and names the stages and actions."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_cases import action, refusal, schedules, with_stage, written

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches, check_schedule
from meshwright.schedule.orders import make_schedule

V = ((0, 3), (1, 2))


@settings(deadline=None)
@given(schedules())
def test_a_missing_action_is_refused(case: tuple[Schedule, int, int]) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    del actions[at]
    refusal(with_stage(schedule, stage, actions))


@settings(deadline=None)
@given(schedules(), st.data())
def test_a_repeated_action_is_refused(case: tuple[Schedule, int, int], data: st.DataObject) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    actions.insert(data.draw(st.integers(at + 1, len(actions))), actions[at])
    assert f"stage {stage} does {actions[at]} twice" in refusal(with_stage(schedule, stage, actions))


@settings(deadline=None)
@given(schedules())
def test_a_stage_run_backwards_is_refused(case: tuple[Schedule, int, int]) -> None:
    schedule, stage, _ = case
    assert f"stage {stage} does" in refusal(with_stage(schedule, stage, list(reversed(schedule.actions[stage]))))


@settings(deadline=None)
@given(schedules(), st.data())
def test_an_action_in_front_of_what_it_needs_is_refused(case: tuple[Schedule, int, int], data: st.DataObject) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    moved = actions.pop(at)
    before, after = schedule.before(stage, moved.chunk), schedule.after(stage, moved.chunk)
    backward = [moved.of(kind) for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)]
    needs = {
        Kind.FORWARD: [moved.of(Kind.RECV_FORWARD)] + [moved.of(Kind.FORWARD, before[1])] * (before[0] == stage) if before else [],
        Kind.BACKWARD: [moved.of(Kind.FORWARD), moved.of(Kind.RECV_BACKWARD)],
        Kind.BACKWARD_INPUT: [moved.of(Kind.FORWARD), moved.of(Kind.RECV_BACKWARD)],
        Kind.BACKWARD_WEIGHT: [moved.of(Kind.BACKWARD_INPUT)],
        Kind.SEND_FORWARD: [moved.of(Kind.FORWARD)],
        Kind.SEND_BACKWARD: backward,
    }.get(moved.kind, [])  # fmt: skip
    if moved.kind.gives_input_gradient and after and after[0] == stage:
        needs += [one.of(one.kind, after[1]) for one in backward]
    there = [actions.index(one) for one in needs if one in actions]
    assume(there)
    actions.insert(data.draw(st.integers(0, max(there))), moved)
    assert f"stage {stage} does {moved} before" in refusal(with_stage(schedule, stage, actions))


@settings(deadline=None)
@given(schedules())
def test_an_action_for_another_micro_batch_is_refused(case: tuple[Schedule, int, int]) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    actions[at] = Action(actions[at].kind, schedule.micro_batches, actions[at].chunk)
    refusal(with_stage(schedule, stage, actions))


@settings(deadline=None)
@given(schedules())
def test_an_action_for_a_chunk_that_is_not_there_is_refused(case: tuple[Schedule, int, int]) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    actions[at] = actions[at].of(actions[at].kind, schedule.chunks)
    assert f"its chunks are 0 to {schedule.chunks - 1}" in refusal(with_stage(schedule, stage, actions))


def test_a_micro_batch_that_is_not_there_is_refused_though_every_stage_runs_it() -> None:
    good = make_schedule("1f1b", 2, 3)
    renamed = tuple(
        tuple(Action(a.kind, 7 if a.micro_batch == 1 else a.micro_batch) for a in actions) for actions in good.actions
    )
    assert "stage 0 lacks forward 1 of 3" in refusal(Schedule("renamed", 3, renamed, good.placement))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("F0 B0 I0 W0", "stage 0 runs backward 0 both whole and split"),
        ("F0 I0", "stage 0 lacks backward weight 0 of 1"),
        ("F0 W0 I0", "stage 0 does W0 before I0"),
        ("F0 B0 W0", "stage 0 does W0 before I0"),
    ],
)
def test_a_backward_is_whole_or_in_both_halves(stage: str, said: str) -> None:
    assert said in refusal(written(stage))


def test_what_a_stage_hands_over_to_itself_has_an_order_and_is_not_sent() -> None:
    one = ((0, 1),)
    check_schedule(written("F0 F0.1 B0.1 B0", placement=one))
    assert "stage 0 does F0.1 before F0" in refusal(written("F0.1 F0 B0.1 B0", placement=one))
    assert "stage 0 does B0 before B0.1 or I0.1" in refusal(written("F0 F0.1 B0 B0.1", placement=one))
    assert "stage 0 does sF0, but hands that tensor over to itself" in refusal(
        written("F0 sF0 rF0.1 F0.1 B0.1 B0", placement=one)
    )


def test_memory_beyond_the_limit_is_refused() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    check_schedule(schedule, most_in_flight=4)
    assert "stage 0 holds the activations of 4 forwards at once, more than 3" in refusal(schedule, 3)


@pytest.mark.parametrize(
    ("stages", "stuck"),
    [
        # Each waits for what the other sends only afterwards.
        (("F0 rB0 B0 sF0", "rF0 F0 B0 sB0"), ("stage 0 waits in rB0", "stage 1 waits in rF0")),
        # Stage 0 is by far not ready to take the gradient that stage 1 hands over before it takes more.
        (
            ("F0 sF0 F1 sF1 F2 sF2 F3 sF3 rB0 B0 rB1 B1 rB2 B2 rB3 B3", "rF0 F0 B0 sB0 rF1 F1 B1 sB1 rF2 F2 B2 sB2 rF3 F3 B3 sB3"),
            ("stage 0 waits in sF2", "stage 1 waits in sB0"),
        ),
        # The last stage sends on to nobody.
        (("F0 sF0 rB0 B0", "rF0 F0 sF0 B0 sB0"), ("stage 1 waits in sF0",)),
        # Three stages, the middle one out of step with the last.
        (
            ("F0 sF0 F1 sF1 rB0 B0 rB1 B1", "rF0 F0 sF0 rF1 F1 rB0 B0 sB0 sF1 rB1 B1 sB1", "rF0 F0 rF1 F1 B0 sB0 B1 sB1"),
            ("stage 1 waits in rB0", "stage 2 waits in rF1"),
        ),
    ],
)  # fmt: skip
def test_a_deadlock_names_the_stages_and_what_they_wait_in(stages: tuple[str, ...], stuck: tuple[str, ...]) -> None:
    message = refusal(written(*stages))
    assert "deadlocks" in message
    for part in stuck:
        assert part in message


def test_stages_that_wait_in_a_ring_are_all_named() -> None:
    """Places in a loop: every stage sends its first chunk's output before it receives."""
    loop = tuple((stage, stage + 3) for stage in range(3))
    good = make_schedule("interleaved", 3, 3, 2)
    check_schedule(good)
    assert good.placement == loop
    ring = [
        ["rF0.1", "F0.1", "F0", "sF0"],
        ["rF0", "F0", "sF0"],
        ["rF0", "F0", "sF0"],
    ]
    message = refusal(
        Schedule("ring", 1, tuple(tuple(map(action, words)) for words in _completed(ring)), loop)
    )  # fmt: skip
    assert all(part in message for part in ("stage 0 waits in rF0.1", "stage 1 waits in rF0", "stage 2 waits in rF0"))


def _completed(stages: list[list[str]]) -> list[list[str]]:
    """With the other half of a step, in an order that would do."""
    first = ["sF0.1", "rB0.1", "B0.1", "sB0.1", "rB0", "B0"]
    middle = ["rF0.1", "F0.1", "sF0.1", "rB0.1", "B0.1", "sB0.1", "rB0", "B0", "sB0"]
    last = ["rF0.1", "F0.1", "B0.1", "sB0.1", "rB0", "B0", "sB0"]
    return [stage + rest for stage, rest in zip(stages, (first, middle, last), strict=True)]


def test_messages_that_would_be_mixed_up_are_refused() -> None:
    """Both are posted in one batch, so nobody waits, but the peer takes the first for the second."""
    swapped = written("F0 F1 sF0 sF1 rB0 B0 rB1 B1", "rF1 rF0 F0 F1 B0 sB0 B1 sB1")
    assert "stage 0 sends sF0 to stage 1, which has rF1 as its next receive" in refusal(swapped)
    check_schedule(written("F0 F1 sF0 sF1 rB0 B0 rB1 B1", "rF0 rF1 F0 F1 B0 sB0 B1 sB1"))


def test_an_activation_and_a_gradient_that_go_the_same_way_keep_their_order() -> None:
    """In a V, chunk 0's output and the gradient of chunk 1's input both go from stage 0 to stage 1."""
    check_schedule(
        written(
            "F0 F1 sF0 rF0.1 F0.1 B0.1 sF1 sB0.1 rF1.1 F1.1 B1.1 sB1.1 rB0 B0 rB1 B1",
            "rF0 F0 F0.1 sF0.1 rF1 rB0.1 F1 F1.1 sF1.1 rB1.1 B0.1 B0 sB0 B1.1 B1 sB1",
            placement=V,
        )
    )
    message = refusal(
        written(
            "F0 F1 sF0 rF0.1 F0.1 B0.1 sB0.1 sF1 rF1.1 F1.1 B1.1 sB1.1 rB0 B0 rB1 B1",
            "rF0 F0 F0.1 sF0.1 rF1 rB0.1 F1 F1.1 sF1.1 rB1.1 B0.1 B0 sB0 B1.1 B1 sB1",
            placement=V,
        )
    )
    assert "stage 0 sends sB0.1 to stage 1, which has rF1 as its next receive" in message


def test_neighbours_that_exchange_in_one_batch_do_not_deadlock() -> None:
    """Both directions are posted together; apart, in the same order on both sides, they would wait for ever."""
    schedule = make_schedule("1f1b", 3, 4)
    exchanged = [
        batch for actions in schedule.actions for batch in batches(actions) if len({a.kind.is_send for a in batch}) == 2
    ]
    assert exchanged
    for actions in schedule.actions:
        assert [a for batch in batches(actions) for a in batch] == list(actions)
        assert all(len(batch) == 1 for batch in batches(actions) if batch[0].kind.is_compute)
