"""Groups of ranks of a Layout as arrays: what `Grid` says rank by rank, for worlds of many thousands.

Rows are groups; columns are their members, in ascending rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.spec.layout import Layout

Ranks = NDArray[np.int64]

STAGE = ("tp", "cp", "dp")
"""The axes whose ranks make up a pipeline stage."""


def groups(layout: Layout, axes: tuple[str, ...]) -> Ranks:
    """Ranks that differ on any of `axes` and on no other: [groups, members]. `Grid.joint_group`, of every rank at once."""
    outermost_first = tuple(reversed(layout.order))
    ranks = np.arange(layout.world).reshape([layout.degree(axis) for axis in outermost_first])
    inside = [at for at, axis in enumerate(outermost_first) if axis in axes]
    outside = [at for at in range(len(outermost_first)) if at not in inside]
    members = int(np.prod([ranks.shape[at] for at in inside], initial=1))
    return ranks.transpose(outside + inside).reshape(-1, members)


def expert_groups(layout: Layout, axes: tuple[str, ...]) -> Ranks:
    """Ranks of a stage that differ on any of `axes` (of edp, ep, etp) and on no other: `Grid.expert_group`, of every rank at once."""
    names = ("stage", "edp", "ep", "etp")
    ranks = groups(layout, STAGE).reshape(layout.pp, layout.edp, layout.ep, layout.etp)
    inside = [at for at, axis in enumerate(names) if axis in axes]
    outside = [at for at in range(len(names)) if at not in inside]
    members = int(np.prod([ranks.shape[at] for at in inside], initial=1))
    return ranks.transpose(outside + inside).reshape(-1, members)


def stage_of(layout: Layout, ranks: Ranks) -> Ranks:
    """The pipeline stage of each of `ranks`."""
    return ranks // layout.stride("pp") % layout.pp


def parts(rows: Ranks, size: int, step: int) -> Ranks:
    """Each row cut into groups of `size` members that stand `step` apart in it: neighbours with step 1 (`Grid.block`), those at the
    same place of every block of `step` otherwise (`Grid.across`). Where they do not fill the row, the first `size` of them alone.
    """
    members = rows.shape[1]
    if members % (size * step):
        return rows[:, ::step][:, :size]
    return rows.reshape(-1, members // (size * step), size, step).swapaxes(2, 3).reshape(-1, size)
