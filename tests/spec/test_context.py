"""Which tokens a cp rank holds: all once, balanced, in whole pieces; and which of them see which."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.spec.context import (
    MASKED_ROWS,
    Ranges,
    check_context,
    context_slices,
    kv_copies,
    sequence_unit,
    tiles,
)
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model

MODEL = Model(
    name="m", family="llama", layers=2, hidden=48, ffn=96, vocab=101, heads=12, kv_heads=4, head_dim=4, max_positions=64
)
SPLITS = [(1, 1), (1, 2), (1, 6), (2, 1), (2, 2), (2, 3), (3, 2), (4, 1), (4, 4)]


def held(seq: int, ring: int, ulysses: int) -> list[list[int]]:
    return [positions(context_slices(seq, ring, ulysses, i)) for i in range(ring * ulysses)]


def positions(ranges: Ranges) -> list[int]:
    return [p for one in ranges for p in one]


@pytest.mark.parametrize(("ring", "ulysses"), SPLITS)
@pytest.mark.parametrize("units", [1, 3])
def test_every_token_is_held_once_and_shares_are_equal(ring: int, ulysses: int, units: int) -> None:
    seq = units * sequence_unit(ring, ulysses)
    ranks = held(seq, ring, ulysses)
    assert sorted(p for rank in ranks for p in rank) == list(range(seq))
    assert {len(rank) for rank in ranks} == {seq // (ring * ulysses)}
    assert all(rank == sorted(rank) for rank in ranks)


def test_the_first_ring_rank_has_the_first_and_the_last_piece() -> None:
    assert context_slices(24, 3, 1, 0) == (range(4), range(20, 24))
    assert context_slices(24, 3, 1, 2) == (range(8, 16),)  # pieces 2 and 3 touch
    assert context_slices(24, 1, 3, 1) == (range(8, 16),)


def test_ulysses_ranks_hold_consecutive_parts_of_what_the_ring_rank_holds() -> None:
    assert [context_slices(24, 2, 3, i) for i in range(3)] == [
        (range(4),),
        (range(4, 6), range(18, 20)),
        (range(20, 24),),
    ]
    for ring, ulysses in SPLITS:
        seq = 2 * sequence_unit(ring, ulysses)
        ranks = held(seq, ring, ulysses)
        for i in range(ring):
            parts = [p for rank in ranks[i * ulysses : (i + 1) * ulysses] for p in rank]
            assert parts == positions(context_slices(seq, ring, 1, i))


@pytest.mark.parametrize("ring", [2, 3, 4])
def test_every_ring_rank_computes_as_much_at_every_step(ring: int) -> None:
    seq = 2 * ring * 8
    blocks = [context_slices(seq, ring, 1, i) for i in range(ring)]
    for step in range(1, ring):
        work = {sum(area(*one) for one in rectangles(blocks[i], blocks[i - step])) for i in range(ring)}
        assert work == {(seq // ring) ** 2 // 2}
        assert all(len(tiles(blocks[i], blocks[i - step])) == 1 for i in range(ring))


def rectangles(queries: Ranges, keys: Ranges) -> list[tuple[range, range]]:
    return [(tile.rows, tile.columns) for tile in tiles(queries, keys)]


def area(rows: range, columns: range) -> int:
    return len(rows) * len(columns)


@settings(max_examples=300)
@given(
    ring=st.integers(1, 4),
    units=st.sampled_from((1, 2, 5, 150)),
    window=st.none() | st.integers(1, 400),
    documents=st.booleans(),
    data=st.data(),
)
def test_tiles_show_each_query_what_it_sees_and_no_more(
    ring: int, units: int, window: int | None, documents: bool, data: st.DataObject
) -> None:
    mine, peer = (data.draw(st.integers(0, ring - 1)) for _ in range(2))
    seq = units * sequence_unit(ring, 1)
    queries, keys = context_slices(seq, ring, 1, mine), context_slices(seq, ring, 1, peer)
    q, k = positions(queries), positions(keys)
    rows_seen: set[int] = set()
    for tile in tiles(queries, keys, window, documents=documents):
        assert not rows_seen & set(tile.rows)
        rows_seen |= set(tile.rows)
        assert tile.masked or not documents
        assert len(tile.rows) <= MASKED_ROWS or not tile.masked
        inside = [k[j] for j in tile.columns]
        for i in tile.rows:
            visible = [p for p in k if p <= q[i] and (window is None or q[i] - p < window)]
            assert not visible or inside[0] <= visible[0] <= visible[-1] <= inside[-1]
            if tile.causal:
                assert visible == k[: i + 1]
            elif not tile.masked:
                assert visible == inside
    assert not any(p <= q[i] and (window is None or q[i] - p < window) for p in k for i in set(range(len(q))) - rows_seen)


def test_masked_tiles_of_a_small_window_are_narrow() -> None:
    whole = context_slices(4096, 1, 1, 0)
    assert max(len(tile.columns) for tile in tiles(whole, whole, 128)) <= 256


# --- refusals


def refusal(layout: Layout, seq: int = 48, model: Model = MODEL) -> str:
    with pytest.raises(UserError) as refused:
        check_context(layout, model, seq)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1), (2, 2), (2, 4), (3, 2)])
def test_a_sequence_that_does_not_divide_is_refused_with_the_nearest_that_do(ring: int, ulysses: int) -> None:
    layout = Layout(cp=ring * ulysses, cp_ulysses=ulysses)
    for seq in range(1, 70):
        try:
            context_slices(seq, ring, ulysses, 0)
            check_context(layout, MODEL, seq)
        except AssertionError:
            words = refusal(layout, seq)
            offered = [int(n) for n in re.findall(r"\d+", words.partition("try seq")[2])]
            assert str(seq) in words
            assert offered
            assert all(abs(n - seq) < sequence_unit(ring, ulysses) for n in offered)
            for n in offered:
                check_context(layout, MODEL, n)


@pytest.mark.parametrize(
    ("layout", "legal"),
    [
        (Layout(cp=8, cp_ulysses=8), "1, 2, 4"),
        (Layout(cp=6, cp_ulysses=6), "1, 2"),
        (Layout(cp=6, cp_ulysses=3), "1, 2"),
        (Layout(cp=4, cp_ulysses=4, tp=4), "1"),
    ],
)
def test_too_few_heads_are_refused_with_the_degrees_that_work(layout: Layout, legal: str) -> None:
    assert refusal(layout).endswith(f"legal ulysses in cp{layout.cp}: {legal}")
    for ulysses in map(int, legal.split(", ")):
        check_context(replace(layout, cp_ulysses=ulysses), MODEL, 48)


def test_key_value_heads_are_copied_where_there_are_fewer_than_ranks() -> None:
    check_context(Layout(cp=12, cp_ulysses=12), MODEL, 48)
    assert [kv_copies(4, u) for u in (1, 2, 4, 12)] == [1, 1, 1, 3]
    check_context(Layout(cp=3, cp_ulysses=3, tp=4), MODEL, 48)  # 3 query heads of 1 key-value head
