"""Groups as arrays are the groups of the grid."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.fabric.traffic import kind_groups
from meshwright.spec.grid import Grid
from meshwright.spec.groups import Ranks, expert_groups, groups, stage_of
from meshwright.spec.layout import DENSE_AXES, Layout

DEGREES = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    degrees = {axis: draw(DEGREES) for axis in DENSE_AXES}
    stage = degrees["dp"] * degrees["cp"] * degrees["tp"]
    etp = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    ep = draw(st.sampled_from([n for n in range(1, stage // etp + 1) if stage // etp % n == 0]))
    return Layout(**degrees, ep=ep, etp=etp, order=tuple(draw(st.permutations(DENSE_AXES))))


def rows(ranks: Ranks) -> list[tuple[int, ...]]:
    return sorted(tuple(int(rank) for rank in row) for row in ranks)


@settings(deadline=None, max_examples=25)
@given(layouts(), st.sets(st.sampled_from(DENSE_AXES), min_size=1))
def test_joint_groups_are_those_of_the_grid(layout: Layout, axes: set[str]) -> None:
    grid = Grid(layout)
    assert rows(groups(layout, tuple(axes))) == sorted(
        {grid.joint_group(rank, tuple(axes)) for rank in range(layout.world)}
    )


@settings(deadline=None, max_examples=25)
@given(layouts(), st.sets(st.sampled_from(("etp", "ep", "edp")), min_size=1))
def test_expert_groups_are_those_of_the_grid(layout: Layout, axes: set[str]) -> None:
    grid = Grid(layout)
    assert rows(expert_groups(layout, tuple(axes))) == sorted(
        {grid.expert_group(rank, tuple(axes)) for rank in range(layout.world)}
    )


@settings(deadline=None, max_examples=25)
@given(layouts())
def test_stages_are_those_of_the_grid(layout: Layout) -> None:
    ranks = groups(layout, DENSE_AXES)[0]
    assert [int(s) for s in stage_of(layout, ranks)] == [Grid(layout).coordinates(int(r))["pp"] for r in ranks]


@pytest.mark.parametrize("order", [("tp", "cp", "dp", "pp"), ("tp", "cp", "pp", "dp"), ("dp", "tp", "pp", "cp")])
def test_groups_that_a_collective_names(order: tuple[str, ...]) -> None:
    """Blocks of neighbours, and those at the same place of each block, as `parallel/mesh.py` makes them."""
    layout = Layout(dp=6, cp=4, tp=2, pp=2, cp_ulysses=2, zero=1, zero_shard=3, order=order)
    grid, world = Grid(layout), range(layout.world)
    nearest = min(layout.stride("dp"), layout.stride("cp"))

    def data_blocks(size: int) -> list[tuple[int, ...]]:
        return sorted({grid.block(grid.data_group(r), r, size) for r in world})

    def data_across(size: int) -> list[tuple[int, ...]]:
        return sorted({grid.across(grid.data_group(r), r, size) for r in world})

    assert rows(kind_groups(layout, "dp", 24, nearest)) == data_blocks(24)
    assert rows(kind_groups(layout, "dp", 3, nearest)) == data_blocks(3)
    assert rows(kind_groups(layout, "dp", 8, nearest * 3)) == data_across(3)
    assert rows(kind_groups(layout, "dp", 6, layout.stride("dp"))) == sorted(grid.groups("dp"))
    ring = sorted({grid.across(grid.group("cp", r), r, 2) for r in world})
    assert rows(kind_groups(layout, "cp", 2, layout.stride("cp") * 2)) == ring
    assert rows(kind_groups(layout, "cp", 2, layout.stride("cp"))) == sorted(
        {grid.block(grid.group("cp", r), r, 2) for r in world}
    )
    ends = Layout(tp=2, pp=4, order=order)
    assert rows(kind_groups(ends, "pp", 2, 3 * ends.stride("pp"))) == sorted(
        {Grid(ends).embedding_group(r) for r in range(8)}
    )


def test_expert_groups_that_a_collective_names() -> None:
    layout = Layout(dp=4, tp=4, pp=2, ep=4, etp=2)
    grid, world = Grid(layout), range(layout.world)
    assert rows(kind_groups(layout, "ep", 8, 1)) == sorted({grid.expert_group(r, ("etp", "ep")) for r in world})
    assert rows(kind_groups(layout, "etp", 2, 1)) == sorted({grid.expert_group(r, ("etp",)) for r in world})
    assert rows(kind_groups(layout, "edp", 2, 8)) == sorted({grid.expert_group(r, ("edp",)) for r in world})
