"""Every schedule is complete, free of deadlock and within its memory; which layers a stage holds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import Shape, legal_shapes, shapes, written

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches, check_schedule
from meshwright.schedule.communication import with_communication
from meshwright.schedule.orders import layout_schedule, make_schedule
from meshwright.schedule.stages import consecutive, even_counts
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout


def words(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule.actions]


def test_every_schedule_passes_the_checker() -> None:
    for name, stages, m, chunks in legal_shapes(6, 13):
        schedule = make_schedule(name, stages, m, chunks)
        assert (schedule.name, schedule.stages, schedule.micro_batches, schedule.chunks) == (name, stages, m, chunks)
        check_schedule(schedule)


def test_two_stages_by_hand() -> None:
    """A receive is posted where its tensor is sent, so that it travels under what is computed meanwhile."""
    gpipe = written("F0 sF0 F1 sF1 rB0 B0 rB1 B1", "rF0 F0 rF1 F1 B0 sB0 B1 sB1")
    assert make_schedule("gpipe", 2, 2).actions == gpipe.actions
    one = written("F0 sF0 F1 sF1 rB0 B0 F2 sF2 rB1 B1 rB2 B2", "rF0 F0 rF1 B0 sB0 F1 B1 sB1 rF2 F2 B2 sB2")
    assert make_schedule("1f1b", 2, 3).actions == one.actions
    middle = "rF0 F0 sF0 rF1 F1 sF1 rF2 rB0 B0 sB0 F2 sF2 rB1 B1 sB1 rB2 B2 sB2"
    assert words(make_schedule("1f1b", 3, 3))[1] == middle


def test_interleaved_by_hand() -> None:
    """Figure 4 of arXiv 2104.04473 in small: rounds of two micro-batches through both chunks, and the way round from the last
    stage to the first."""
    assert words(make_schedule("interleaved", 2, 2, 2)) == [
        "F0 sF0 F1 sF1 rF0.1 F0.1 sF0.1 rF1.1 F1.1 sF1.1 rB0.1 B0.1 sB0.1 rB1.1 B1.1 sB1.1 rB0 B0 rB1 B1",
        "rF0 F0 sF0 rF1 F1 sF1 rF0.1 F0.1 rF1.1 B0.1 sB0.1 F1.1 rB0 B1.1 sB1.1 B0 sB0 rB1 B1 sB1",
    ]


def test_the_fold_of_a_v_sends_nothing() -> None:
    schedule = make_schedule("zb-v", 2, 4, 2)
    assert schedule.placement == ((0, 3), (1, 2))
    assert not [a for a in schedule.actions[1] if str(a).startswith(("sF", "rB")) and a.chunk == 0]
    assert not [a for a in schedule.actions[1] if str(a).startswith(("rF", "sB")) and a.chunk == 1]
    assert {schedule.peer(0, a) for a in schedule.actions[0] if not a.kind.is_compute} == {1}


@settings(deadline=None)
@given(shapes())
def test_every_chunk_runs_each_micro_batch_once_each_way_in_order(shape: Shape) -> None:
    schedule = make_schedule(*shape)
    for actions in schedule.actions:
        for chunk in range(schedule.chunks):
            its = [a for a in actions if a.chunk == chunk]
            every = list(range(schedule.micro_batches))
            assert [a.micro_batch for a in its if a.kind is Kind.FORWARD] == every
            assert [a.micro_batch for a in its if a.kind.gives_input_gradient] == every
            halves = [[a.micro_batch for a in its if a.kind is k] for k in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)]
            assert halves[0] == halves[1]


@settings(deadline=None)
@given(shapes())
def test_what_a_stage_sends_the_peer_receives_in_the_same_order(shape: Shape) -> None:
    """NCCL and gloo match the messages of a pair of ranks by their order alone."""
    schedule = make_schedule(*shape)
    sent: dict[tuple[int, int], list[object]] = {}
    received: dict[tuple[int, int], list[object]] = {}
    for stage, actions in enumerate(schedule.actions):
        for a in actions:
            if a.kind.is_send:
                sent.setdefault((stage, schedule.peer(stage, a)), []).append(schedule.counterpart(stage, a))
            elif not a.kind.is_compute:
                received.setdefault((schedule.peer(stage, a), stage), []).append((stage, a))
    assert sent == received
    hops = schedule.stages * schedule.chunks - 1
    here = sum(schedule.after(stage, 0) == (stage, 1) for stage in range(schedule.stages))
    if schedule.stages > 1:
        assert sum(map(len, sent.values())) == 2 * schedule.micro_batches * (hops - here)


@settings(deadline=None)
@given(shapes())
def test_counterparts_are_each_others(shape: Shape) -> None:
    schedule = make_schedule(*shape)
    for stage, actions in enumerate(schedule.actions):
        for a in actions:
            if not a.kind.is_compute:
                other = schedule.counterpart(stage, a)
                assert other is not None
                assert schedule.counterpart(*other) == (stage, a)
                assert a.kind.is_send != other[1].kind.is_send


@settings(deadline=None)
@given(shapes())
def test_a_send_follows_what_it_sends_and_nothing_is_received_long_before_it_is_sent(shape: Shape) -> None:
    schedule = make_schedule(*shape)
    for actions in schedule.actions:
        for batch, before in zip(batches(actions)[1:], batches(actions), strict=False):
            for a in batch:
                if a.kind is Kind.SEND_FORWARD:
                    assert before == (a.of(Kind.FORWARD),)
                elif a.kind is Kind.SEND_BACKWARD:
                    assert before[0] in (a.of(Kind.BACKWARD), a.of(Kind.BACKWARD_INPUT))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), st.integers())
def test_any_order_that_can_run_gets_communication_that_does_not_deadlock(p: int, v: int, m: int, seed: int) -> None:
    """Computations in a random order that respects what each needs."""
    random = Random(seed)
    places = tuple(tuple(chunk * p + stage for chunk in range(v)) for stage in range(p))
    there_and_back = [("F", place) for place in range(p * v)] + [("I", place) for place in reversed(range(p * v))]
    left = [(i, list(there_and_back)) for i in range(m)]
    weights: list[tuple[int, Action]] = []
    orders: list[list[Action]] = [[] for _ in range(p)]
    while left or weights:
        if weights and (not left or random.random() < 0.4):
            stage, weight = weights.pop(random.randrange(len(weights)))
            orders[stage].append(weight)
            continue
        i, path = random.choice(left)
        kind, place = path.pop(0)
        stage, chunk = place % p, place // p
        orders[stage].append(Action(Kind(kind), i, chunk))
        if kind == "I":
            weights.append((stage, Action(Kind.BACKWARD_WEIGHT, i, chunk)))
        left = [one for one in left if one[1]]
    check_schedule(with_communication("random", m, orders, places))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_memory_is_what_the_papers_say(p: int) -> None:
    """In chunks: a stage of 1F1B holds up to `p` micro-batches of its whole share."""
    m = 4 * p
    for stage in range(p):
        assert make_schedule("gpipe", p, m).in_flight(stage) == m
        assert make_schedule("1f1b", p, m).in_flight(stage) == p - stage
        h1 = make_schedule("zb-h1", p, m)
        assert (h1.in_flight(stage), h1.deferred(stage), h1.held(stage)) == (p - stage, min(stage + 1, m), p)
        folded = make_schedule("zb-v", p, m, 2)
        assert folded.in_flight(stage) == folded.held(stage) == 2 * p
        dual = make_schedule("dualpipe-v", p, m, 2)
        assert (dual.in_flight(stage), dual.held(stage)) == (2 * p + 1, 2 * p + 1)
        # It splits as few backwards as fill its waits: on the way in, and half of the last ones.
        assert sum(a.kind is Kind.BACKWARD_INPUT for a in dual.actions[stage]) == 2 * (p - 1 - stage) + stage + 1
        assert dual.deferred(stage) == stage + 1
    # Section 2.2.2 of arXiv 2104.04473: the same as 1F1B plus (p - 1) / (p v) of it.
    assert make_schedule("interleaved", p, m, 2).in_flight(0) == 2 * p + p - 1


def test_a_layout_without_pipeline_runs_its_micro_batches_in_turn() -> None:
    schedule = layout_schedule(Layout(dp=4), 3)
    assert words(schedule) == ["F0 B0 F1 B1 F2 B2"]
    assert schedule.in_flight(0) == 1
    assert layout_schedule(Layout(pp=4, schedule="gpipe"), 3) == make_schedule("gpipe", 4, 3)
    assert layout_schedule(Layout(pp=2, chunks=3, schedule="interleaved"), 4) == make_schedule("interleaved", 2, 4, 3)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (("1f1p", 2, 2, 1), "unknown pipeline schedule '1f1p': did you mean 1f1b.*legal: gpipe, 1f1b"),
        (("1f1b", 2, 0, 1), "at least 1 micro-batch, got 0"),
        (("interleaved", 4, 6, 2), "6 is not a multiple of 4 stages; try 4 or 8"),
        (("interleaved", 4, 3, 2), "3 is not a multiple of 4 stages; try 4$"),
        (("interleaved", 4, 8, 1), "at least 2 chunks a stage, got 1"),
        (("dualpipe-v", 4, 7, 2), "dualpipe-v needs at least 2 x 4 stages = 8 micro-batches, got 7"),
        (("zb-v", 4, 8, 1), "zb-v holds 2 chunks a stage, got 1"),
        (("1f1b", 4, 8, 2), "1f1b holds 1 chunk a stage, got 2"),
    ],
)
def test_a_schedule_that_does_not_exist_is_refused(shape: Shape, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_schedule(*shape)


# --- which layers a stage holds


@given(layers=st.integers(1, 130), stages=st.integers(1, 130))
def test_stages_hold_the_layers_in_order_and_evenly(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(UserError, match=rf"{stages} pipeline stages for {layers} layers.*at most {layers}"):
            even_counts(layers, stages)
        return
    held = consecutive(even_counts(layers, stages))
    counts = [len(its) for its in held]
    assert [layer for its in held for layer in its] == list(range(layers))
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 1
    assert counts[-1] == min(counts), "the last stage also carries the head"
    assert counts[:-1] == sorted(counts[:-1]), "the first stages hold the most micro-batches in flight"
