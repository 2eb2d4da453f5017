"""Schedules are complete and free of deadlock, the checker refuses those that are not, and the timeline's bubble is the closed form."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.cost.timeline import play
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches, check_schedule
from meshwright.schedule.orders import layout_schedule, make_schedule, peak_in_flight
from meshwright.schedule.stages import distinct_stages, stage_layers
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import BUILT_SCHEDULES

NAMES = st.sampled_from(BUILT_SCHEDULES)
STAGES = st.integers(1, 8)
MICRO_BATCHES = st.integers(1, 16)


def refusal(schedule: Schedule) -> str:
    with pytest.raises(UserError) as refused:
        check_schedule(schedule)
    assert "\n" not in str(refused.value)
    assert schedule.name in str(refused.value)
    return str(refused.value)


def with_stage(schedule: Schedule, stage: int, actions: list[Action]) -> Schedule:
    changed = (*schedule.actions[:stage], tuple(actions), *schedule.actions[stage + 1 :])
    return Schedule("broken", schedule.micro_batches, changed)


def written(*stages: str) -> Schedule:
    """A schedule from lines such as "F0 sF0 rB0 B0"."""
    kinds = sorted(Kind, key=lambda kind: -len(kind.value))
    actions = []
    for line in stages:
        words = [(next(k for k in kinds if word.startswith(k.value)), word) for word in line.split()]
        actions.append(tuple(Action(kind, int(word[len(kind.value) :])) for kind, word in words))
    forwards = sum(action.kind is Kind.FORWARD for action in actions[0])
    return Schedule("by hand", forwards, tuple(actions))


# --- the schedules


@pytest.mark.parametrize("name", BUILT_SCHEDULES)
def test_every_schedule_passes_the_checker(name: str) -> None:
    for stages in range(1, 9):
        for m in (1, 2, 3, 4, 5, 7, 8, 9, 16):
            schedule = make_schedule(name, stages, m)
            assert (schedule.name, schedule.stages, schedule.micro_batches) == (name, stages, m)
            check_schedule(schedule)


def test_two_stages_by_hand() -> None:
    assert make_schedule("gpipe", 2, 2) == Schedule(
        "gpipe", 2, written("F0 sF0 F1 sF1 rB0 B0 rB1 B1", "rF0 F0 rF1 F1 B0 sB0 B1 sB1").actions
    )
    assert make_schedule("1f1b", 2, 2) == Schedule(
        "1f1b", 2, written("F0 sF0 F1 sF1 rB0 B0 rB1 B1", "rF0 F0 B0 sB0 rF1 F1 B1 sB1").actions
    )
    assert [str(action) for action in make_schedule("1f1b", 3, 3).actions[1]] == (
        [
            "rF0",
            "F0",
            "sF0",
            "rF1",
            "F1",
            "sF1",
            "rB0",
            "B0",
            "sB0",
            "rF2",
            "F2",
            "sF2",
            "rB1",
            "B1",
            "sB1",
            "rB2",
            "B2",
            "sB2",
        ]
    )


@settings(deadline=None)
@given(NAMES, STAGES, MICRO_BATCHES)
def test_every_stage_runs_each_micro_batch_once_each_way_in_order(name: str, stages: int, m: int) -> None:
    for actions in make_schedule(name, stages, m).actions:
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            assert [action.micro_batch for action in actions if action.kind is kind] == list(range(m))


@settings(deadline=None)
@given(NAMES, STAGES, MICRO_BATCHES)
def test_what_a_stage_sends_its_neighbour_receives_in_the_same_order(name: str, stages: int, m: int) -> None:
    actions = make_schedule(name, stages, m).actions
    for one, other in pairwise(actions):
        for send, receive, sender, receiver in (
            (Kind.SEND_FORWARD, Kind.RECV_FORWARD, one, other),
            (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD, other, one),
        ):
            sent = [a.micro_batch for a in sender if a.kind is send]
            assert sent == [a.micro_batch for a in receiver if a.kind is receive] == list(range(m))
    ends = {a.kind for a in actions[0] if a.kind in (Kind.RECV_FORWARD, Kind.SEND_BACKWARD)}
    ends |= {a.kind for a in actions[-1] if a.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)}
    assert not ends


def test_kinds_match_their_opposites() -> None:
    for kind in Kind:
        if not kind.is_compute:
            assert kind.match.match is kind
            assert kind.step == -kind.match.step
            assert kind.is_send != kind.match.is_send


@settings(deadline=None)
@given(NAMES, STAGES, MICRO_BATCHES)
def test_peak_in_flight_is_what_the_lists_hold(name: str, stages: int, m: int) -> None:
    schedule = make_schedule(name, stages, m)
    for stage in range(stages):
        held = schedule.in_flight(stage)
        assert peak_in_flight(name, stage, stages, m) == held
        assert held == (m if name == "gpipe" else min(m, stages - stage))


def test_a_layout_without_pipeline_runs_its_micro_batches_in_turn() -> None:
    schedule = layout_schedule(Layout(dp=4), 3)
    assert [str(action) for [*actions] in schedule.actions for action in actions] == ["F0", "B0", "F1", "B1", "F2", "B2"]
    assert schedule.in_flight(0) == 1
    assert layout_schedule(Layout(pp=4, schedule="gpipe"), 3) == make_schedule("gpipe", 4, 3)


def test_a_schedule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown pipeline schedule '1f1p': did you mean 1f1b.*legal: gpipe, 1f1b"):
        make_schedule("1f1p", 2, 2)
    with pytest.raises(UserError, match="at least 1 micro-batch, got 0"):
        make_schedule("1f1b", 2, 0)


# --- the checker


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int, int]:
    """A schedule, and one action in it by stage and position."""
    schedule = make_schedule(draw(NAMES), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    stage = draw(st.integers(0, schedule.stages - 1))
    return schedule, stage, draw(st.integers(0, len(schedule.actions[stage]) - 1))


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
    action = actions.pop(at)
    needs = {
        Kind.BACKWARD: Kind.FORWARD,
        Kind.SEND_FORWARD: Kind.FORWARD,
        Kind.SEND_BACKWARD: Kind.BACKWARD,
        **({Kind.FORWARD: Kind.RECV_FORWARD} if stage else {}),
    }
    assume(action.kind in needs)
    needed = actions.index(Action(needs[action.kind], action.micro_batch))
    actions.insert(data.draw(st.integers(0, needed)), action)
    assert f"stage {stage} does {action} before" in refusal(with_stage(schedule, stage, actions))


@settings(deadline=None)
@given(schedules())
def test_an_action_for_another_micro_batch_is_refused(case: tuple[Schedule, int, int]) -> None:
    schedule, stage, at = case
    actions = list(schedule.actions[stage])
    actions[at] = Action(actions[at].kind, schedule.micro_batches)
    refusal(with_stage(schedule, stage, actions))


def test_a_micro_batch_that_is_not_there_is_refused_though_every_stage_runs_it() -> None:
    renamed = tuple(
        tuple(Action(a.kind, 7 if a.micro_batch == 1 else a.micro_batch) for a in actions)
        for actions in make_schedule("1f1b", 2, 3).actions
    )
    assert "stage 0" in refusal(Schedule("renamed", 3, renamed))


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


def test_neighbours_that_exchange_in_one_batch_do_not_deadlock() -> None:
    """Both directions are posted together; apart, in the same order on both sides, they would wait for ever."""
    schedule = make_schedule("1f1b", 3, 4)
    exchanged = [
        batch for actions in schedule.actions for batch in batches(actions) if len({a.kind.is_send for a in batch}) == 2
    ]
    assert exchanged
    for actions in schedule.actions:
        assert [action for batch in batches(actions) for action in batch] == list(actions)
        assert all(len(batch) == 1 for batch in batches(actions) if batch[0].kind.is_compute)


# --- the timeline


@settings(deadline=None)
@given(NAMES, STAGES, MICRO_BATCHES, st.integers(1, 9), st.integers(1, 9))
def test_the_bubble_is_the_closed_form(name: str, p: int, m: int, forward: int, backward: int) -> None:
    """(p - 1) / (m + p - 1) of the step for any ratio of forward to backward (arXiv 2104.04473, section 2.2.1)."""
    timeline = play(make_schedule(name, p, m), [forward] * p, [backward] * p, send=0)
    assert timeline.end == (m + p - 1) * (forward + backward)
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert all(timeline.busy(stage) == m * (forward + backward) for stage in range(p))


@st.composite
def priced(draw: st.DrawFn) -> tuple[Schedule, list[int], list[int], int]:
    stages = draw(st.integers(1, 5))
    seconds = st.lists(st.integers(1, 9), min_size=stages, max_size=stages)
    return (
        make_schedule(draw(NAMES), stages, draw(st.integers(1, 8))),
        draw(seconds),
        draw(seconds),
        draw(st.integers(0, 4)),
    )


@settings(deadline=None)
@given(priced())
def test_nothing_starts_before_its_input_arrives_or_while_the_stage_is_busy(
    case: tuple[Schedule, list[int], list[int], int],
) -> None:
    schedule, forward, backward, send = case
    timeline = play(schedule, forward, backward, send)
    ends = {(s.stage, s.kind, s.micro_batch): s.end for s in timeline.spans}
    assert len(ends) == len(timeline.spans) == 2 * schedule.stages * schedule.micro_batches
    for stage in range(schedule.stages):
        its = [span for span in timeline.spans if span.stage == stage]
        assert [(s.kind, s.micro_batch) for s in its] == [
            (a.kind, a.micro_batch) for a in schedule.actions[stage] if a.kind.is_compute
        ]
        assert all(one.end <= other.start for one, other in pairwise(its))
        for span in its:
            assert span.end - span.start == (forward if span.kind is Kind.FORWARD else backward)[stage]
            source = stage - 1 if span.kind is Kind.FORWARD else stage + 1
            if 0 <= source < schedule.stages:
                assert span.start >= ends[source, span.kind, span.micro_batch] + send
            elif span.kind is Kind.BACKWARD:
                assert span.start >= ends[stage, Kind.FORWARD, span.micro_batch]


@settings(deadline=None)
@given(priced())
def test_the_step_is_never_shorter_than_its_bounds(case: tuple[Schedule, list[int], list[int], int]) -> None:
    schedule, forward, backward, send = case
    timeline = play(schedule, forward, backward, send)
    m, p = schedule.micro_batches, schedule.stages
    assert timeline.end >= m * max(f + b for f, b in zip(forward, backward, strict=True))
    assert timeline.end >= sum(forward) + sum(backward) + 2 * (p - 1) * send
    assert 0 <= timeline.bubble < 1
    slower = play(schedule, [f + 1 for f in forward], backward, send)
    assert slower.end > timeline.end


# --- which layers a stage holds


@given(layers=st.integers(1, 130), stages=st.integers(1, 130))
def test_stages_hold_the_layers_in_order_and_evenly(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(UserError, match=rf"{stages} pipeline stages for {layers} layers.*at most {layers}"):
            stage_layers(layers, stages)
        return
    held = stage_layers(layers, stages)
    counts = [len(its) for its in held]
    assert [layer for its in held for layer in its] == list(range(layers))
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 1
    assert counts[-1] == min(counts), "the last stage also carries the head"
    assert counts[:-1] == sorted(counts[:-1]), "the first stages hold the most micro-batches in flight"


@given(layers=st.integers(1, 130), stages=st.integers(1, 130))
def test_distinct_stages_stand_for_all(layers: int, stages: int) -> None:
    assume(stages <= layers)
    counts = [len(its) for its in stage_layers(layers, stages)]
    kinds = distinct_stages(layers, stages)
    assert sum(count for _, count in kinds) == stages
    assert [first for first, _ in kinds] == sorted({first for first, _ in kinds})
    assert kinds[0][0] == 0
    for first, count in kinds:
        alike = [
            s
            for s in range(stages)
            if (s == 0, s == stages - 1, counts[s]) == (first == 0, first == stages - 1, counts[first])
        ]
        assert (alike[0], len(alike)) == (first, count)
