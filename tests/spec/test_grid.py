"""Ranks, coordinates and groups: every rank has one place, and every axis cuts the world into equal groups."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.layout import DENSE_AXES, Layout

DEGREES = st.integers(1, 4)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    degrees = {axis: draw(DEGREES) for axis in DENSE_AXES}
    return Grid(Layout(**degrees, order=tuple(draw(st.permutations(DENSE_AXES)))))


@settings(deadline=None)
@given(grids())
def test_coordinates_and_rank_are_inverse(grid: Grid) -> None:
    for rank in range(grid.world):
        here = grid.coordinates(rank)
        assert set(here) == set(DENSE_AXES)
        assert all(0 <= index < grid.layout.degree(axis) for axis, index in here.items())
        assert grid.rank(**here) == rank


@settings(deadline=None)
@given(grids())
def test_the_first_axis_of_the_order_varies_fastest(grid: Grid) -> None:
    outermost_first = tuple(reversed(grid.layout.order))
    places = product(*(range(grid.layout.degree(axis)) for axis in outermost_first))
    for rank, place in enumerate(places):
        assert grid.coordinates(rank) == dict(zip(outermost_first, place, strict=True))


@settings(deadline=None)
@given(grids())
def test_the_groups_of_an_axis_partition_the_world(grid: Grid) -> None:
    for axis in DENSE_AXES:
        groups = grid.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world))
        assert {len(group) for group in groups} == {grid.layout.degree(axis)}
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@settings(deadline=None)
@given(grids(), st.data())
def test_members_of_a_group_differ_on_its_axis_alone(grid: Grid, data: st.DataObject) -> None:
    rank, axis = data.draw(st.integers(0, grid.world - 1)), data.draw(st.sampled_from(DENSE_AXES))
    group = grid.group(axis, rank)
    assert rank in group
    assert [grid.coordinates(member)[axis] for member in group] == list(range(len(group)))
    for member in group:
        assert grid.group(axis, member) == group
        assert {**grid.coordinates(member), axis: 0} == {**grid.coordinates(rank), axis: 0}
        stride = grid.layout.stride(axis)
        assert member - group[0] == stride * grid.coordinates(member)[axis]


@settings(deadline=None)
@given(grids())
def test_groups_of_two_axes_meet_in_one_rank(grid: Grid) -> None:
    for rank in range(grid.world):
        for one, other in (("tp", "dp"), ("pp", "cp"), ("dp", "pp")):
            assert set(grid.group(one, rank)) & set(grid.group(other, rank)) == {rank}


@given(tp=DEGREES, cp=DEGREES, dp=DEGREES, pp=DEGREES)
def test_by_default_tensor_parallel_ranks_are_neighbours_and_stages_are_furthest_apart(
    tp: int, cp: int, dp: int, pp: int
) -> None:
    grid = Grid(Layout(tp=tp, cp=cp, dp=dp, pp=pp))
    assert grid.groups("tp") == [tuple(range(first, first + tp)) for first in range(0, grid.world, tp)]
    assert grid.group("pp", 0) == tuple(range(0, grid.world, grid.world // pp))


@given(dp=DEGREES, pp=DEGREES, heads=DEGREES, replicas=DEGREES, data=st.data())
def test_replicas_of_a_key_value_head_are_neighbours_in_the_tensor_parallel_group(
    dp: int, pp: int, heads: int, replicas: int, data: st.DataObject
) -> None:
    grid = Grid(Layout(tp=heads * replicas, dp=dp, pp=pp, order=tuple(data.draw(st.permutations(DENSE_AXES)))))
    rank = data.draw(st.integers(0, grid.world - 1))
    whole = grid.group("tp", rank)
    parts = [grid.block(whole, member, replicas) for member in whole]
    assert rank in grid.block(whole, rank, replicas)
    assert sorted(set(parts)) == sorted(whole[i : i + replicas] for i in range(0, len(whole), replicas))
    assert all(member in part for member, part in zip(whole, parts, strict=True))


@settings(deadline=None)
@given(grids())
def test_the_first_and_last_stage_hold_a_tied_embedding(grid: Grid) -> None:
    last = grid.layout.pp - 1
    for rank in range(grid.world):
        group = grid.embedding_group(rank)
        here = grid.coordinates(rank)
        ends = dict.fromkeys((grid.rank(**{**here, "pp": 0}), grid.rank(**{**here, "pp": last})))
        assert group == tuple(ends)


def test_a_small_grid_by_hand() -> None:
    grid = Grid(Layout(tp=2, dp=2, pp=2))
    assert grid.coordinates(5) == {"tp": 1, "cp": 0, "dp": 0, "pp": 1}
    assert grid.rank(pp=1, tp=1) == 5
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert grid.groups("cp") == [(rank,) for rank in range(8)]
    assert grid.embedding_group(7) == (3, 7)


@pytest.mark.parametrize("rank", [-1, 8, 100])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=rf"^rank {rank} is outside the world of 8 ranks$"):
        Grid(Layout(dp=8)).coordinates(rank)
