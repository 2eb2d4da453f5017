"""Collectives on plain tensors: the one place that calls torch.distributed, and the autograd functions over it.

Each autograd function is named for its forward and its backward. Groups of one rank communicate nothing.
Tensors are gathered and scattered along their first dim, where the pieces of the ranks lie one behind the other, so
neither direction copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.ledger import Entry, Ledger

# PyTorch 2.13 renames these two; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _reduce_scatter(out: Tensor, tensor: Tensor, *, group: dist.ProcessGroup | None, async_op: bool) -> Any:
    """gloo's own reduce-scatter takes longer than its all-reduce; an all-to-all and a sum in rank order send the same bytes
    and take about half of its time (docs/log.md)."""
    if dist.get_backend(group) != "gloo":
        return _native_reduce_scatter(out, tensor, group=group, async_op=async_op)
    pieces = torch.empty_like(tensor)
    later = _SumLater(dist.all_to_all_single(pieces, tensor, group=group, async_op=True), pieces, out)
    if async_op:
        return later
    later.wait()
    return None


@dataclass(frozen=True)
class _SumLater:
    """A handle whose wait adds up the pieces that have arrived."""

    work: dist.Work
    pieces: Tensor
    out: Tensor

    def wait(self) -> None:
        self.work.wait()
        torch.sum(self.pieces.view(-1, *self.out.shape), dim=0, out=self.out)


@dataclass(frozen=True, eq=False)
class Group:
    """The ranks that differ on one axis, this rank's place among them, and the process group that joins them."""

    axis: str
    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None
    ledger: Ledger

    @property
    def size(self) -> int:
        return len(self.ranks)

    def _record(self, op: str, tensor: Tensor) -> None:
        self.ledger.record(Entry(self.axis, op, self.size), tensor.numel() * tensor.element_size())

    def all_reduce(self, tensor: Tensor, *, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> Any:
        """In place. Returns a handle to wait on unless `wait`."""
        if self.size == 1:
            return None
        self._record("all_reduce", tensor)
        return dist.all_reduce(tensor, op=op, group=self.handle, async_op=not wait)

    def all_gather(self, out: Tensor, tensor: Tensor, *, wait: bool = True) -> Any:
        """`out` [size * n, ...] becomes the concatenation of every rank's `tensor` [n, ...]."""
        self._record("all_gather", out)
        return _all_gather(out, tensor, group=self.handle, async_op=not wait)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, *, wait: bool = True) -> Any:
        """`out` [n, ...] becomes this rank's piece of the sum of every rank's `tensor` [size * n, ...]."""
        self._record("reduce_scatter", tensor)
        return _reduce_scatter(out, tensor, group=self.handle, async_op=not wait)

    def all_to_all(
        self, out: Tensor, tensor: Tensor, out_rows: Sequence[int], rows: Sequence[int], *, nbytes: int | None = None
    ) -> None:
        """Send `rows[i]` rows of `tensor` to rank i and receive `out_rows[i]` rows from it, in rank order.

        `nbytes`: what the ledger counts, where it is not the input.
        """
        self.ledger.record(Entry(self.axis, "all_to_all", self.size), tensor.nbytes if nbytes is None else nbytes)
        dist.all_to_all_single(out, tensor, list(out_rows), list(rows), group=self.handle)

    def gathered_outside_ledger(self, tensor: Tensor) -> Tensor:
        """The concatenation of every rank's `tensor`, for checks: what no step does must not be counted."""
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        _all_gather(out, tensor.contiguous(), group=self.handle)
        return out

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """Post sends (tensor, peer index) and receives together; returns the handles, sends first."""
        ops = []
        for tensor, peer in sends:
            self._record("send", tensor)
            ops.append(dist.P2POp(dist.isend, tensor, self.ranks[peer], self.handle))
        ops += [dist.P2POp(dist.irecv, tensor, self.ranks[peer], self.handle) for tensor, peer in receives]
        return dist.batch_isend_irecv(ops) if ops else []


def gathered(tensor: Tensor, group: Group) -> Tensor:
    """A new tensor of the group's pieces, along dim 0."""
    if group.size == 1:
        return tensor
    out = tensor.new_empty(group.size * tensor.shape[0], *tensor.shape[1:])
    group.all_gather(out, tensor.contiguous())
    return out


def scattered(tensor: Tensor, group: Group) -> Tensor:
    """This rank's piece, along dim 0, of the sum over the group."""
    if group.size == 1:
        return tensor
    out = tensor.new_empty(tensor.shape[0] // group.size, *tensor.shape[1:])
    group.reduce_scatter(out, tensor.contiguous())
    return out


class _AllReduceForwardIdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        group.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatterForwardAllGatherBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.group), None


class _AllGatherForwardReduceScatterBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scattered(grad, ctx.group), None


class _IdentityForwardAllReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(grad)
        return grad, None


def all_gather_forward_reduce_scatter_backward(x: Tensor, group: Group) -> Tensor:
    """The group's pieces along dim 0, of which every rank uses all for a part of the result."""
    return x if group.size == 1 else _AllGatherForwardReduceScatterBackward.apply(x, group)  # type: ignore[no-any-return]


def identity_forward_all_reduce_backward(x: Tensor, group: Group) -> Tensor:
    """What every rank has, and uses for a part of the result: the parts of its gradient are summed."""
    return x if group.size == 1 else _IdentityForwardAllReduceBackward.apply(x, group)  # type: ignore[no-any-return]


def all_reduce_forward_identity_backward(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, in place; every rank's gradient is already the whole one."""
    return x if group.size == 1 else _AllReduceForwardIdentityBackward.apply(x, group)  # type: ignore[no-any-return]


def reduce_scatter_forward_all_gather_backward(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, of which each rank keeps its piece along dim 0."""
    return x if group.size == 1 else _ReduceScatterForwardAllGatherBackward.apply(x, group)  # type: ignore[no-any-return]
