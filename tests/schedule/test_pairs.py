"""Pairs of a forward and a backward: which there are, that they can run at once, and what the clock and the timeline make of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import PairedShape, action, legal_shapes, paired_shapes, written

from meshwright.cost.timeline import ChunkSeconds, play, play_ends, together
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches, check_schedule
from meshwright.schedule.clock import wind_clock
from meshwright.schedule.orders import layout_clock, layout_schedule, make_schedule
from meshwright.schedule.pairs import computations, is_pair, paired
from meshwright.spec.errors import UserError
from meshwright.spec.layout import PAIRING, SCHEDULES, Layout
from meshwright.spec.notation import parse_layout

PAIR = ChunkSeconds(3, 6, 2, forward_apart=1, backward_apart=2, beside=0.0)


def pairs(schedule: Schedule, stage: int) -> list[tuple[Action, ...]]:
    return [unit for unit in computations(schedule, stage) if len(unit) == 2]


@pytest.mark.parametrize(
    ("first", "second", "can"),
    [
        ("F1", "B0.1", True),
        ("F1.1", "B0", True),
        ("F1", "B0", False),  # the same chunk
        ("F1", "B1.1", False),  # the same micro-batch
        ("B0.1", "F1", False),
        ("F1", "I0.1", False),
        ("F1", "W0.1", False),
        ("F1", "F0.1", False),
        ("F1", "sB0.1", False),
    ],
)
def test_what_is_a_pair(first: str, second: str, can: bool) -> None:
    assert is_pair(action(first), action(second)) is can


def test_two_stages_written_out() -> None:
    schedule = make_schedule("dualpipe-v", 2, 4, 2, paired=True)
    words = [" ".join("+".join(map(str, unit)) for unit in computations(schedule, stage)) for stage in (0, 1)]
    assert words == [
        "F0 F1 F2 F0.1 I0.1 W0.1 F1.1 F3+B1.1 F2.1+B0 B2.1 F3.1+B1 B3.1 I2 W2 I3 W3",
        "F0 F0.1 F1 F1.1 F2+B0.1 F2.1+B0 F3+B1.1 F3.1+B1 B2.1 B2 I3.1 I3 W3.1 W3",
    ]


@settings(deadline=None, max_examples=40)
@given(paired_shapes(6, 10))
def test_pairs_stand_side_by_side_can_run_and_hold_no_more(shape: PairedShape) -> None:
    """Nothing is sent or received between the two; both results leave after both."""
    name, stages, m, chunks, _ = shape
    schedule, plain = make_schedule(*shape), make_schedule(name, stages, m, chunks)
    check_schedule(schedule, most_in_flight=2 * stages + 1)
    for stage in range(stages):
        work = paired(batches(schedule.actions[stage]))
        assert [unit for unit in work if unit[0].kind.is_compute] == computations(schedule, stage)
        assert [a for unit in work for a in unit] == list(schedule.actions[stage])
        computed = [[a for a in s.actions[stage] if a.kind.is_compute] for s in (schedule, plain)]
        assert computed[0] == computed[1]
        assert schedule.in_flight(stage) == plain.in_flight(stage)
        assert computations(plain, stage) == [(a,) for a in computed[1]]


def test_the_schedules_that_pair_are_those_whose_steady_state_is_pairs() -> None:
    """With many micro-batches nearly every forward of these is in a pair; of the others, less than half."""
    for name, stages, m, chunks in legal_shapes(4, 32):
        if m < 32:
            continue
        schedule = make_schedule(name, stages, m, chunks, paired=True)
        share = min(len(pairs(schedule, stage)) for stage in range(stages)) / (m * schedule.chunks)
        assert (share > 0.8) is (name in PAIRING), (name, stages, share)
    assert set(PAIRING) <= set(SCHEDULES)


def test_a_layout_says_whether_its_schedule_is_paired() -> None:
    plain, hidden = (parse_layout(f"dp2 pp2x2:dualpipe-v ep2{mode}") for mode in ("", ":async"))
    assert layout_schedule(hidden, 4) == make_schedule("dualpipe-v", 2, 4, 2, paired=True)
    assert layout_schedule(plain, 4) == make_schedule("dualpipe-v", 2, 4, 2)
    assert any(waits.joins for waits in layout_clock(hidden, 4))
    assert not any(waits.joins for waits in layout_clock(plain, 4))
    assert not layout_schedule(Layout(), 4).paired


def test_a_pair_that_waits_for_a_pair_is_named() -> None:
    """One after the other the two stages could run this; at the same time neither pair can begin."""
    stages = "F0 F1.1 B0.1 B1.1", "F1 F0.1 B1 B0"
    schedule = Schedule("by hand", 2, written(*stages).actions, ((0, 1), (2, 3)), paired=True)
    with pytest.raises(UserError, match="schedule by hand deadlocks"):
        wind_clock(schedule)


# --- what a pair takes


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (ChunkSeconds(3, 6), ChunkSeconds(3, 6), 9),  # nothing to hide
        (PAIR, PAIR, 6),  # 2 + 4 seconds of work, and the backward alone takes 6
        (ChunkSeconds(3, 6, forward_apart=1), PAIR, 6),
        (ChunkSeconds(8, 9, forward_apart=7), PAIR, 9),  # one link: 7 + 2 seconds of sending
        (ChunkSeconds(9, 9, forward_apart=5), PAIR, 9),  # the forward alone
        (ChunkSeconds(4, 8, forward_apart=1), ChunkSeconds(4, 8, backward_apart=1, beside=0.0), 10),  # 3 + 7 of work
    ],
)
def test_a_pair_is_as_long_as_its_tightest_bound(forward: ChunkSeconds, backward: ChunkSeconds, expected: float) -> None:
    assert together(forward, backward) == expected


@settings(deadline=None)
@given(*[st.floats(0, 10)] * 4, st.floats(0, 1))
def test_a_pair_is_never_below_its_bounds_nor_above_the_sum(
    work: float, sent: float, more: float, sent_more: float, beside: float
) -> None:
    forward = ChunkSeconds(work + sent, 0, forward_apart=sent)
    backward = ChunkSeconds(0, more + sent_more, backward_apart=sent_more, beside=beside)
    took = together(forward, backward)
    assert took >= max(work + sent, more + sent_more, work + more, sent + sent_more) - 1e-9
    assert took <= work + sent + more + sent_more + 1e-9


@settings(deadline=None)
@given(paired_shapes(5, 8), st.integers(0, 3), st.data())
def test_the_timeline_runs_pairs_as_the_clock_does(shape: PairedShape, send: int, data: st.DataObject) -> None:
    schedule = make_schedule(*shape)
    numbers = st.integers(1, 4)

    def chunk() -> ChunkSeconds:
        apart = data.draw(numbers), data.draw(numbers)
        return ChunkSeconds(apart[0] + data.draw(numbers), apart[1] + 4 + data.draw(numbers), 2, *apart, 0.25)

    seconds = [[chunk() for _ in range(schedule.chunks)] for _ in range(schedule.stages)]
    timeline = play(schedule, seconds, send)
    assert timeline.end == pytest.approx(max(span.end for span in timeline.spans))
    at = {(s.stage, s.kind, s.micro_batch, s.chunk): s for s in timeline.spans}
    for stage in range(schedule.stages):
        for unit in computations(schedule, stage):
            spans = [at[stage, a.kind, a.micro_batch, a.chunk] for a in unit]
            assert len({(span.start, span.end) for span in spans}) == 1
            for one in spans:
                forward = one.kind is Kind.FORWARD
                seat = (schedule.before if forward else schedule.after)(stage, one.chunk)
                if one.kind is Kind.BACKWARD_WEIGHT or seat is None:
                    continue
                kinds = (Kind.FORWARD,) if forward else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
                (source,) = [at[key] for k in kinds if (key := (seat[0], k, one.micro_batch, seat[1])) in at]
                assert one.start >= source.end + (send if seat[0] != stage else 0) - 1e-9
        assert timeline.hidden(stage) >= 0
        assert timeline.busy(stage) <= timeline.end + 1e-9
        assert bool(pairs(schedule, stage)) is (timeline.hidden(stage) > 0)
    assert 0 <= timeline.bubble < 1


def test_hiding_makes_the_step_shorter_and_nothing_to_hide_no_shorter() -> None:
    plain, both = (make_schedule("dualpipe-v", 4, 16, 2, paired) for paired in (False, True))
    chunk = ChunkSeconds(3, 6, 2)
    alone = play(plain, [[chunk] * 2] * 4, send=0)
    assert play(both, [[PAIR] * 2] * 4, send=0).end < 0.85 * alone.end
    assert play(both, [[chunk] * 2] * 4, send=0).end >= alone.end
    assert max(play_ends(wind_clock(plain), [[PAIR] * 2] * 4, 0)) == alone.end
