"""A long step ends when playing all of it says so, and its stages hold at most what fewer micro-batches show."""

from __future__ import annotations

from random import Random

import pytest

from meshwright.cost import steady
from meshwright.cost.steady import step_end
from meshwright.cost.timeline import ChunkSeconds, play
from meshwright.schedule.orders import layout_order, make_order, shorter
from meshwright.spec.layout import Layout, ScheduleName

NAMES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "zb-h1", "zb-v", "dualpipe-v", "interleaved")


def drawn(name: str, draw: Random) -> tuple[int, int, int]:
    """(stages, micro-batches, chunks)."""
    stages = draw.choice((2, 3, 4, 6, 8))
    chunks = {"interleaved": draw.choice((2, 3)), "zb-v": 2, "dualpipe-v": 2}.get(name, 1)
    micro_batches = draw.randint(9 * stages, 20 * stages)
    return stages, micro_batches - (micro_batches % stages if name == "interleaved" else 0), chunks


def durations(draw: Random, even: bool) -> ChunkSeconds:
    forward = 1.0 if even else draw.uniform(0.2, 2.0)
    return ChunkSeconds(forward, 2 * forward, forward * (1.0 if even else draw.uniform(0.5, 1.5)))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", NAMES)
def test_a_long_step_ends_as_if_all_of_it_were_played(name: ScheduleName, seed: int) -> None:
    draw = Random(f"{name} {seed}")
    stages, micro_batches, chunks = drawn(name, draw)
    seconds = [[durations(draw, even=seed % 3 == 0) for _ in range(chunks)] for _ in range(stages)]
    send = draw.choice((0.0, 0.1, 2.0))
    layout = Layout(schedule=name, pp=stages, chunks=chunks)
    whole = play(layout_order(layout, micro_batches), seconds, send)
    assert step_end(layout, micro_batches, seconds, send) == pytest.approx(whole.end, rel=1e-12)


@pytest.mark.parametrize("name", NAMES[1:])
def test_equal_stages_are_not_played_to_the_end(name: ScheduleName, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, micro_batches, chunks = drawn(name, Random(name))
    played = []
    real = steady.play_ends
    monkeypatch.setattr(steady, "play_ends", lambda turns, *rest: played.append(len(turns)) or real(turns, *rest))
    layout = Layout(schedule=name, pp=stages, chunks=chunks)
    step_end(layout, micro_batches, [[durations(Random(), even=True)] * chunks] * stages, 0.1)
    all_of_it = sum(len(actions) for actions in make_order(name, stages, micro_batches, chunks).actions)
    assert all(turns < all_of_it for turns in played)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_no_more_is_held_by_more_micro_batches(name: ScheduleName, seed: int) -> None:
    stages, micro_batches, chunks = drawn(name, Random(f"{name} {seed}"))
    few, many = (make_order(name, stages, m, chunks) for m in (shorter(name, stages, micro_batches), micro_batches))
    for stage in range(stages):
        sizes, later = [3 + chunk for chunk in range(chunks)], [5 - chunk for chunk in range(chunks)]
        assert few.peak(stage, sizes, later) == many.peak(stage, sizes, later)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_end_alike(seed: int) -> None:
    draw = Random(seed)
    stages, micro_batches, chunks = drawn("dualpipe-v", draw)
    layout = Layout(schedule="dualpipe-v", dp=2, ep=2, async_ep=True, pp=stages, chunks=chunks)
    seconds = [[ChunkSeconds(1.0, 2.0, 1.0, draw.random(), draw.random(), 0.2)] * chunks for _ in range(stages)]
    whole = play(layout_order(layout, micro_batches), seconds, 0.1)
    assert step_end(layout, micro_batches, seconds, 0.1) == pytest.approx(whole.end, rel=1e-12)
    alone = [[ChunkSeconds(1.0, 2.0, 1.0)] * chunks] * stages
    assert whole.end < step_end(layout, micro_batches, alone, 0.1)
