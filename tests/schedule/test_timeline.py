"""The timeline's bubbles are the published ones; nothing runs before it can.

t_F, t_I and t_W are of one chunk; a whole backward takes t_I + t_W.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import Shape, shapes

from meshwright.cost.timeline import ChunkSeconds, Timeline, lockstep_utilisation, play
from meshwright.schedule.actions import Kind, Schedule
from meshwright.schedule.orders import make_schedule

STAGES = st.integers(1, 8)
SECONDS = st.integers(1, 9)


def even(schedule: Schedule, forward: float, input_: float, weight: float) -> Timeline:
    """Every chunk takes the same time, and sending takes none."""
    chunk = ChunkSeconds(forward, input_ + weight, weight)
    return play(schedule, [[chunk] * schedule.chunks] * schedule.stages, send=0)


# --- what the papers say


@settings(deadline=None)
@given(st.sampled_from(("gpipe", "1f1b")), STAGES, st.integers(1, 16), SECONDS, SECONDS)
def test_gpipe_and_1f1b(name: str, p: int, m: int, forward: int, weight: int) -> None:
    """(p - 1) / (m + p - 1) of the step for any ratio of forward to backward (arXiv 2104.04473, section 2.2.1)."""
    timeline = even(make_schedule(name, p, m), forward, 1, weight)
    each = forward + 1 + weight
    assert timeline.end == (m + p - 1) * each
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert all(timeline.busy(stage) == m * each for stage in range(p))


@settings(deadline=None)
@given(STAGES, st.integers(1, 3), st.integers(2, 4), SECONDS, SECONDS)
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, rounds: int, v: int, forward: int, weight: int) -> None:
    """(p - 1) / v / m of the ideal time (arXiv 2104.04473, section 2.2.2), for any ratio of forward to backward."""
    m = rounds * p
    timeline = even(make_schedule("interleaved", p, m, v), forward, 1, weight)
    ideal = m * v * (forward + 1 + weight)
    assert (timeline.end - ideal) / ideal == pytest.approx((p - 1) / v / m)
    assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


@settings(deadline=None)
@given(STAGES, st.integers(0, 8), SECONDS, SECONDS, st.integers(0, 4))
def test_zb_h1(p: int, more: int, forward: int, weight: int, slower: int) -> None:
    """(p - 1) (t_F + t_I - t_W) (arXiv 2401.10241, table 2), from p micro-batches on, while t_W is no more than the others."""
    m, f, i = p + more, max(forward, weight), max(forward, weight) + slower
    timeline = even(make_schedule("zb-h1", p, m), f, i, weight)
    assert timeline.end - m * (f + i + weight) == (p - 1) * (f + i - weight)
    assert timeline.idle(0) == (p - 1) * (f + i - weight)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_zb_v_has_no_bubble_but_the_fill(p: int) -> None:
    """At t_F = t_I = t_W no stage ever waits (arXiv 2401.10241, section 6), from 2p - 1 micro-batches on. Stage s starts s t_F late
    and ends as much later, so that a step which all stages begin and end together still shows (p - 1) t_F."""
    for m in (2 * p - 1, 2 * p, 3 * p + 1):
        timeline = even(make_schedule("zb-v", p, m, 2), 1, 1, 1)
        assert [timeline.idle(stage) for stage in range(p)] == [0] * p
        assert timeline.end == 6 * m + p - 1
    if p > 2:
        short = even(make_schedule("zb-v", p, 2 * p - 2, 2), 1, 1, 1)
        assert any(short.idle(stage) for stage in range(p))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seconds", [(1, 1, 1), (3, 4, 3), (3, 5, 2), (5, 5, 3)])
def test_dualpipe_v(p: int, seconds: tuple[int, int, int]) -> None:
    """DualPipe's (PP/2 - 1) (F&B + B - 3W) (arXiv 2412.19437, table 2) with PP = 2p chunks, F&B = F + B and B = I + W is
    (p - 1) (F + 2I - W). That is for a forward and a backward that end as one; played one after the other the bubble is less, and
    at F = I = W it is (p - 1) (F + I - W)."""
    f, i, w = seconds
    for m in (2 * p, 4 * p + 1):
        bubble = even(make_schedule("dualpipe-v", p, m, 2), f, i, w).end - 2 * m * (f + i + w)
        assert (p - 1) * (f + i - w) <= bubble <= (p - 1) * (f + 2 * i - w)
        if f == i == w:
            assert bubble == (p - 1) * (f + i - w)


def test_in_order_of_their_bubbles() -> None:
    """The same model, cut into 4 stages or 8 chunks, 16 micro-batches."""
    bubbles = {
        name: even(make_schedule(name, 4, 16, v), 2 / v, 2 / v, 2 / v).bubble
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("dualpipe-v", 2), ("zb-v", 2))
    }
    assert bubbles["gpipe"] == bubbles["1f1b"] > bubbles["interleaved"] > bubbles["zb-h1"] > bubbles["zb-v"]
    assert bubbles["zb-v"] == bubbles["dualpipe-v"]


# --- the figure that is often shown


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_four_stages_four_micro_batches(name: str) -> None:
    """The convention that gives the figure, and beside it what the stages really do at t_B = t_F and t_B = 2 t_F."""
    schedule = make_schedule(name, 4, 4)
    shown = [0.25, 0.5, 0.75, 1, 0.75, 0.75, 1, 0.75, 0.5, 0.25]
    assert lockstep_utilisation(schedule) == shown
    assert sum(shown) / len(shown) == 0.65
    assert even(schedule, 1, 0.5, 0.5).end == 14
    assert even(schedule, 1, 1, 1).end == 21
    assert even(schedule, 1, 1, 1).bubble == pytest.approx(3 / 7)


def test_lockstep_of_one_stage() -> None:
    assert lockstep_utilisation(make_schedule("1f1b", 1, 3)) == [1, 1, 1]


@settings(deadline=None)
@given(shapes(5, 8))
def test_lockstep_does_everything(shape: Shape) -> None:
    schedule = make_schedule(*shape)
    shares = lockstep_utilisation(schedule)
    assert all(0 < share <= 1 for share in shares)
    assert len(shares) >= schedule.micro_batches * schedule.chunks


# --- what holds for any durations


def test_a_stage_hands_over_to_itself_at_once() -> None:
    """Two stages in a V, one micro-batch: there and back in 4 forwards, 4 input gradients and 4 sends, and two weight gradients:
    between the two chunks at the fold, and last of all on the first stage."""
    chunk = ChunkSeconds(1, 2, 1)
    assert play(make_schedule("zb-v", 2, 1, 2), [[chunk] * 2] * 2, send=10).end == 4 + 4 + 4 * 10 + 2
    assert play(make_schedule("zb-v", 1, 1, 2), [[chunk] * 2], send=10).end == 6


@st.composite
def priced(draw: st.DrawFn) -> tuple[Schedule, list[list[ChunkSeconds]], int]:
    schedule = make_schedule(*draw(shapes(5, 8)))
    seconds = [
        [ChunkSeconds(draw(SECONDS), (weight := draw(SECONDS)) + draw(SECONDS), weight) for _ in range(schedule.chunks)]
        for _ in range(schedule.stages)
    ]
    return schedule, seconds, draw(st.integers(0, 4))


@settings(deadline=None)
@given(priced())
def test_nothing_starts_before_its_input_arrives_or_while_the_stage_is_busy(
    case: tuple[Schedule, list[list[ChunkSeconds]], int],
) -> None:
    schedule, seconds, send = case
    timeline = play(schedule, seconds, send)
    ends = {
        (schedule.placement[s.stage][s.chunk], s.kind is Kind.FORWARD, s.micro_batch): (s.end, s.stage)
        for s in timeline.spans
        if s.kind is not Kind.BACKWARD_WEIGHT
    }
    for stage in range(schedule.stages):
        its = [span for span in timeline.spans if span.stage == stage]
        assert [(s.kind, s.micro_batch, s.chunk) for s in its] == [
            (a.kind, a.micro_batch, a.chunk) for a in schedule.actions[stage] if a.kind.is_compute
        ]
        assert all(one.end <= other.start for one, other in pairwise(its))
        for span in its:
            one = seconds[stage][span.chunk]
            forward, place = span.kind is Kind.FORWARD, schedule.placement[stage][span.chunk]
            assert (
                span.end - span.start
                == {
                    Kind.FORWARD: one.forward,
                    Kind.BACKWARD: one.backward,
                    Kind.BACKWARD_INPUT: one.backward - one.weight,  # type: ignore[operator]
                    Kind.BACKWARD_WEIGHT: one.weight,
                }[span.kind]
            )
            if span.kind is Kind.BACKWARD_WEIGHT:
                continue
            if source := ends.get((place - 1 if forward else place + 1, forward, span.micro_batch)):
                assert span.start >= source[0] + (send if source[1] != stage else 0)
            if not forward:
                assert span.start >= ends[place, True, span.micro_batch][0]


@settings(deadline=None)
@given(priced())
def test_the_step_is_never_shorter_than_its_bounds(case: tuple[Schedule, list[list[ChunkSeconds]], int]) -> None:
    schedule, seconds, send = case
    timeline = play(schedule, seconds, send)
    m = schedule.micro_batches
    work = [sum(one.forward + one.backward for one in its) for its in seconds]
    assert [timeline.busy(stage) for stage in range(schedule.stages)] == [m * one for one in work]
    assert timeline.end >= m * max(work)
    hops = sum(
        (after := schedule.after(stage, chunk)) is not None and after[0] != stage
        for stage in range(schedule.stages)
        for chunk in range(schedule.chunks)
    )
    weights = sum(one.weight or 0 for its in seconds for one in its) if schedule.splits_backward else 0
    assert timeline.end >= sum(work) - weights + 2 * hops * send
    assert 0 <= timeline.bubble < 1
    assert all(0 <= timeline.idle(stage) <= timeline.end - timeline.busy(stage) for stage in range(schedule.stages))
    slower = [[ChunkSeconds(one.forward + 1, one.backward, one.weight) for one in its] for its in seconds]
    assert play(schedule, slower, send).end > timeline.end
