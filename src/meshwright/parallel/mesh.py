"""The mesh: one immutable object that owns coordinates, groups and names. Nothing else does rank arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Ledger
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid, Members, derived_groups, group_members
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Seat


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's view of the grid. `groups` has

    tp, cp, dp, pp          one for each axis of the dense world equation
    ring, ulysses           the two parts of cp
    ep, etp, edp            one for each axis of the expert equation; `ep` joins all ranks that share a layer's experts, ep x etp
    data                    dp x cp: the ranks that hold the same dense weights
    shard, replicate        of those, the ranks that cut the state among them, and those that hold the same part of it
    expert_shard, expert_replicate   likewise of edp
    kv                      tp ranks that share a key-value head, where the model has fewer heads than ranks
    embedding               first and last stage, where they share a tied embedding

    `lanes`: by chunk, the groups of IN_PASSES once more; empty where no two chunks run at the same time.
    """

    layout: Layout
    rank: int
    device: torch.device
    coordinates: MappingProxyType[str, int]
    groups: MappingProxyType[str, Group]
    ledger: Ledger = field(repr=False)
    lanes: tuple[MappingProxyType[str, Group], ...] = ()

    def lane(self, chunk: int) -> Mesh:
        """As the passes of a chunk see it. Collectives of one communicator must be issued in the same order on all of its ranks, and
        what two passes issue at the same time has none; so what the other chunk or a reduction of gradients uses is not theirs."""
        return replace(self, groups=self.lanes[chunk], lanes=()) if self.lanes else self

    def __getitem__(self, name: str) -> Group:
        return self.groups[name]

    @property
    def stage(self) -> int:
        return self.coordinates["pp"]

    @property
    def seat(self) -> Seat:
        return Seat(self.coordinates["tp"], self.coordinates["ep"], self.coordinates["etp"])

    def owns(self, replicas: str | None) -> bool:
        """Whether this rank is the one, of those that hold the same values, that counts and saves them."""
        return replicas is None or self.groups[replicas].index == 0

    def sum_over(self, tensor: Tensor, axes: Iterable[str] = ("tp", "cp", "pp", "dp")) -> Tensor:
        """Sum `tensor` in place over all the given axes, innermost first."""
        for axis in axes:
            self.groups[axis].all_reduce(tensor)
        return tensor


IN_PASSES = ("tp", "cp", "ring", "ulysses", "ep")
"""Groups whose collectives are a part of forward and backward."""


def build_mesh(layout: Layout, model: Model, device: torch.device, ledger: Ledger | None = None) -> Mesh:
    """Make the process groups of `layout`. Needs an initialised process group unless the world is one rank. What the groups
    send is told to `ledger`.

    Raises UserError when the number of processes is not the layout's world.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world != layout.world:
        raise UserError(f"layout '{layout}' needs {layout.world} ranks, but {world} were started")
    grid, ledger = Grid(layout), ledger or Ledger()
    handles = _lone_handles(grid, rank) if _is_fake() else _axis_handles(layout, device)
    groups = {}
    for axis in layout.order:
        ranks = grid.group(axis, rank)
        groups[axis] = Group(axis, ranks, ranks.index(rank), handles.get(axis), ledger)
    for name, (axis, members) in derived_groups(grid, model).items():
        groups[name] = _group(axis, members, groups, rank, world, ledger)
    lanes = []
    for _ in range(layout.chunks if layout.async_ep else 0):
        own: dict[str, Group] = {}
        for name in (name for name in IN_PASSES if name in groups):
            members = group_members(grid, model, name)
            own[name] = _group(groups[name].axis, members, own, rank, world, ledger)
        lanes.append(MappingProxyType(groups | own))
    coordinates = grid.coordinates(rank) | grid.expert_coordinates(rank)
    return Mesh(layout, rank, device, MappingProxyType(coordinates), MappingProxyType(groups), ledger, tuple(lanes))


def _is_fake() -> bool:
    """Whether one process stands for the whole world (PyTorch's fake process group), so that no other rank waits for its part in
    the making of a group."""
    return dist.is_initialized() and dist.get_backend() == "fake"


def _lone_handles(grid: Grid, rank: int) -> dict[str, dist.ProcessGroup]:
    """Of the axes above degree 1, this rank's groups alone: a world may have tens of thousands of others."""
    layout = grid.layout
    return {axis: dist.new_group(list(grid.group(axis, rank))) for axis in layout.order if layout.degree(axis) > 1}


def _axis_handles(layout: Layout, device: torch.device) -> dict[str, dist.ProcessGroup]:
    """One process group for each axis above degree 1, made by PyTorch's DeviceMesh."""
    outermost_first = [axis for axis in reversed(layout.order) if layout.degree(axis) > 1]
    if not outermost_first:
        return {}
    ranks = torch.arange(layout.world).view([layout.degree(axis) for axis in outermost_first])
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=tuple(outermost_first))
    return {axis: mesh.get_group(axis) for axis in outermost_first}


def _group(axis: str, members: Members, made: dict[str, Group], rank: int, world: int, ledger: Ledger) -> Group:
    """A group beside those of the axes, with a process group of its own unless one that was made has the same ranks.

    `members(r)` need not contain r: a stage between the first and the last has no part in their group.
    """
    mine = members(rank)
    index = mine.index(rank) if rank in mine else -1
    if len(mine) == 1:
        return Group(axis, mine, index, None, ledger)
    same = next((group for group in made.values() if group.ranks == mine and group.handle is not None), None)
    if same is not None:  # the grid is regular: what is equal for one rank is equal for all
        return Group(axis, mine, index, same.handle, ledger)
    handle = None
    for ranks in [mine] if _is_fake() else sorted({members(r) for r in range(world)}):
        created = dist.new_group(list(ranks))
        if ranks == mine:
            handle = created
    return Group(axis, mine, index, handle, ledger)
