"""The rank grid of a Layout: coordinates and groups, without torch.

This is the only rank arithmetic in Meshwright. `parallel/mesh.py` adds process groups to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Split


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks 0..world-1 laid out by `layout.order`, the first axis varying fastest."""

    layout: Layout

    @property
    def world(self) -> int:
        return self.layout.world

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name to index on that axis."""
        if not 0 <= rank < self.world:
            raise UserError(f"rank {rank} is outside the world of {self.world} ranks")
        out = {}
        for axis in self.layout.order:
            rank, out[axis] = divmod(rank, self.layout.degree(axis))
        return out

    def rank(self, **coordinates: int) -> int:
        """The rank at the given coordinates; axes left out are 0."""
        return sum(index * self.layout.stride(axis) for axis, index in coordinates.items())

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` only, in axis order."""
        here = self.coordinates(rank)
        return tuple(self.rank(**{**here, axis: i}) for i in range(self.layout.degree(axis)))

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group of `axis`, ordered by first rank."""
        return sorted({self.group(axis, rank) for rank in range(self.world)})

    def joint_group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks that differ from `rank` on any of `axes` and on no other, ascending."""
        here = self.coordinates(rank)
        others = [range(self.layout.degree(axis)) for axis in axes]
        return tuple(sorted(self.rank(**{**here, **dict(zip(axes, at, strict=True))}) for at in product(*others)))

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """Place among the ranks of the stage, which experts split anew: etp innermost, then ep, then edp ("parallel
        folding", arXiv 2504.14960)."""
        layout, here = self.layout, self.coordinates(rank)
        within, stride = 0, 1  # the place among the ranks of the stage, ascending
        for axis in layout.order:
            if axis != "pp":
                within, stride = within + here[axis] * stride, stride * layout.degree(axis)
        rest, etp = divmod(within, layout.etp)
        edp, ep = divmod(rest, layout.ep)
        return {"etp": etp, "ep": ep, "edp": edp}

    def expert_group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The ranks of the stage that differ from `rank` on any of `axes` (of etp, ep, edp) and on no other, ascending."""
        fixed = [axis for axis in ("etp", "ep", "edp") if axis not in axes]
        here = self.expert_coordinates(rank)
        stage = self.joint_group(rank, ("tp", "cp", "dp"))
        return tuple(r for r in stage if all(self.expert_coordinates(r)[axis] == here[axis] for axis in fixed))

    def data_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same dense weights: they differ on dp and cp."""
        return self.joint_group(rank, ("cp", "dp"))

    @staticmethod
    def block(ranks: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
        """Of `ranks` in blocks of `size` neighbours, the block that holds `rank`."""
        start = ranks.index(rank) // size * size
        return ranks[start : start + size]

    @staticmethod
    def across(ranks: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
        """Of `ranks` in blocks of `size` neighbours, those at the same place of their block as `rank`."""
        return ranks[ranks.index(rank) % size :: size]

    def embedding_group(self, rank: int) -> tuple[int, ...]:
        """First and last stage at this rank's other coordinates: the two holders of a tied embedding."""
        pp = self.group("pp", rank)
        return (pp[0], pp[-1]) if len(pp) > 1 else pp


Members = Callable[[int], tuple[int, ...]]
"""The ranks of the group that a rank belongs to."""


def derived_groups(grid: Grid, model: Model) -> dict[str, tuple[str, Members]]:
    """Groups beside those of the axes, as `parallel/mesh.py` names them: (axis that the ledger books them on, members)."""
    layout = grid.layout
    out: dict[str, tuple[str, Members]] = {"data": ("dp", grid.data_group)}
    out["shard"] = ("dp", lambda r: grid.block(grid.data_group(r), r, layout.state_shards))
    out["replicate"] = ("dp", lambda r: grid.across(grid.data_group(r), r, layout.state_shards))
    out["ring"] = ("cp", lambda r: grid.across(grid.group("cp", r), r, layout.cp_ulysses))
    out["ulysses"] = ("cp", lambda r: grid.block(grid.group("cp", r), r, layout.cp_ulysses))
    if layout.tp > model.kv_heads:
        out["kv"] = ("tp", lambda r: grid.block(grid.group("tp", r), r, layout.tp // model.kv_heads))
    if model.tied and Split.of(layout).ends_apart:
        out["embedding"] = ("pp", grid.embedding_group)
    if model.experts is not None:
        out["ep"] = ("ep", lambda r: grid.expert_group(r, ("etp", "ep")))
        out["etp"] = ("etp", lambda r: grid.expert_group(r, ("etp",)))
        out["edp"] = ("edp", lambda r: grid.expert_group(r, ("edp",)))
        shards = layout.expert_state_shards
        out["expert_shard"] = ("edp", lambda r: grid.block(grid.expert_group(r, ("edp",)), r, shards))
        out["expert_replicate"] = ("edp", lambda r: grid.across(grid.expert_group(r, ("edp",)), r, shards))
    return out


def group_members(grid: Grid, model: Model, name: str) -> Members:
    """Of the axis or the derived group `name`: the ranks of the group that a rank belongs to."""
    if name in grid.layout.order:
        return lambda rank: grid.group(name, rank)
    return derived_groups(grid, model)[name][1]
