"""The mesh: one immutable object that owns coordinates, groups and names. Nothing else does rank arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Ledger
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's view of the grid. `groups` has `tp`, `cp`, `dp`, `pp`, and where the model needs them `kv` (tp ranks that
    share a key-value head) and `embedding` (first and last stage, for a tied embedding)."""

    layout: Layout
    rank: int
    device: torch.device
    coordinates: MappingProxyType[str, int]
    groups: MappingProxyType[str, Group]
    ledger: Ledger = field(repr=False)

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    @property
    def stage(self) -> int:
        return self.coordinates["pp"]

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pp - 1

    def owns(self, replicas: str | None) -> bool:
        """Whether this rank is the one, of those that hold the same values, that counts and saves them."""
        return replicas is None or self.groups[replicas].index == 0

    def sum_over(self, tensor: Tensor, axes: Iterable[str] = ("tp", "cp", "pp", "dp")) -> Tensor:
        """Sum `tensor` in place over all the given axes, innermost first."""
        for axis in axes:
            self.groups[axis].all_reduce(tensor)
        return tensor


def build_mesh(layout: Layout, model: Model, device: torch.device) -> Mesh:
    """Make the process groups of `layout`. Needs an initialised process group unless the world is one rank.

    Raises UserError when the number of processes is not the layout's world.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world != layout.world:
        raise UserError(f"layout '{layout}' needs {layout.world} ranks, but {world} were started")
    grid, ledger = Grid(layout), Ledger()
    handles = _axis_handles(layout, device)
    groups = {}
    for axis in layout.order:
        ranks = grid.group(axis, rank)
        groups[axis] = Group(axis, ranks, ranks.index(rank), handles.get(axis), ledger)
    if layout.tp > model.kv_heads:
        replicas = layout.tp // model.kv_heads
        groups["kv"] = _extra_group("tp", [grid.kv_group(r, replicas) for r in range(world)], rank, ledger)
    if model.tied and layout.pp > 1:
        groups["embedding"] = _extra_group("pp", [grid.embedding_group(r) for r in range(world)], rank, ledger)
    coordinates = MappingProxyType(grid.coordinates(rank))
    return Mesh(layout, rank, device, coordinates, MappingProxyType(groups), ledger)


def _axis_handles(layout: Layout, device: torch.device) -> dict[str, dist.ProcessGroup]:
    """One process group for each axis above degree 1, made by PyTorch's DeviceMesh."""
    outermost_first = [axis for axis in reversed(layout.order) if layout.degree(axis) > 1]
    if not outermost_first:
        return {}
    ranks = torch.arange(layout.world).view([layout.degree(axis) for axis in outermost_first])
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=tuple(outermost_first))
    return {axis: mesh.get_group(axis) for axis in outermost_first}


def _extra_group(axis: str, groups: list[tuple[int, ...]], rank: int, ledger: Ledger) -> Group:
    """A process group across part of an axis. `groups[r]` belongs to rank r, though it need not contain it."""
    mine, handle = groups[rank], None
    for ranks in sorted(set(groups)):
        made = dist.new_group(list(ranks))
        if ranks == mine:
            handle = made
    return Group(axis, mine, mine.index(rank) if rank in mine else -1, handle, ledger)
