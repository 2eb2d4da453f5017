"""Expert parallel: tokens travel to the ranks that hold their experts, and the outputs come home.

The ranks of a pipeline stage are split anew for the routed experts, etp innermost, then ep, then edp ("parallel folding",
Liu et al. 2025, arXiv 2504.14960). The rank at ep index i holds experts [i E/ep, (i+1) E/ep) of every layer, and of each of
them the hidden units [j F/etp, (j+1) F/etp) of its etp index j. Every rank brings tokens of its own. A token's row goes to
all etp ranks of its expert; each computes a partial sum over its hidden units, and the token's home adds the partial sums.

No token is dropped for want of room: a rank sends as many rows as its router wishes, none included (the all-to-all of
GShard, Lepikhin et al. 2020, arXiv 2006.16668, without its fixed capacity).

Shape suffixes: t tokens of this rank, k experts of a token, j etp ranks, E all experts, e experts of this rank, r ranks of
the group, n rows, D hidden, T = t * tp tokens of a micro-batch, S its sequences, l MoE layers, X several columns side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meshwright.models.moe import Experts, MoE, Order, Routing, take, weigh
from meshwright.parallel.collectives import Group, gathered
from meshwright.parallel.linear import WeightGradients, grouped_linear
from meshwright.parallel.tensor import TensorParallel
from meshwright.spec.errors import UserError


def apply_expert_parallel(
    moe: MoE,
    ep: Group,
    tp: Group,
    gradients: WeightGradients,
    *,
    etp: int,
    sequence: bool,
    micro_batch: int,
    overlap: bool = False,
) -> None:
    """Make `moe` one rank's share of it. Parameters keep their names; the rank's cuts of them are set afterwards.

    `ep`: the ep x etp ranks that hold the experts once, by ep index, then etp index. `tp`: the ranks that hold the same
    micro-batch, as its parts with `sequence`, else whole; then each routes 1/tp of the tokens, so that no expert sees a token
    twice. Either way a rank has only part of the router's gradient. The shared expert is tensor parallel.
    """
    moe.experts.product = partial(grouped_linear, gradients=gradients)  # type: ignore[method-assign]
    if ep.size > 1:
        moe.dispatch = ExpertParallelDispatch(ep, moe.router.weight.shape[0], etp)
    if tp.size > 1 and moe.shared is not None:
        make = TensorParallel(tp, gradients, sequence, micro_batch, overlap)
        moe.shared.gate_up, moe.shared.down = make.columns(moe.shared.gate_up), make.row(moe.shared.down)
    if tp.size > 1 and not sequence:
        moe.routed = partial(_route_part, moe.routed, tp)  # type: ignore[method-assign]


def _route_part(routed: Callable[[Tensor], Tensor], tp: Group, x_TD: Tensor) -> Tensor:
    """`routed` on this rank's 1/tp of the T = t * tp tokens that every tp rank holds; y_TD on every rank."""
    if x_TD.shape[0] % tp.size:
        raise UserError(
            f"tp {tp.size} ranks route equal parts of a micro-batch's {x_TD.shape[0]} tokens: it does not divide; "
            f"try micro_batch x seq = {-(-x_TD.shape[0] // tp.size) * tp.size}"
        )
    return all_gather_forward_slice_backward(routed(slice_forward_all_gather_backward(x_TD, tp)), tp)


class ExpertParallelDispatch(nn.Module):
    """Runs routed experts that are spread over `group`, whose ranks are ordered by ep index, then etp index."""

    def __init__(self, group: Group, experts: int, etp: int):
        super().__init__()
        self.group, self.etp = group, etp
        self.held = experts * etp // group.size
        assert self.held * group.size == experts * etp, "ep divides the experts of a legal layout"

    def forward(self, x_tD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Returns y_tD, each token's weighed sum over its experts. Every rank of the group must call it, whatever its t."""
        (t, k), D = routing.experts_tk.shape, x_tD.shape[1]
        slots_n = self._slots(routing.experts_tk)
        home = Order.by(slots_n)
        counts = self._exchange_counts(slots_n)
        trip = Trip(counts.leaving, counts.arriving, nbytes=len(slots_n) * D * x_tD.element_size())
        there = Order.by(counts.expert_n)

        x_nD = all_to_all_forward_all_to_all_backward(
            take(x_tD, home.source // (k * self.etp), home.place), trip, self.group
        )
        y_nD = self._run(experts, take(x_nD, there.source, there.place), counts.held)
        y_nD = all_to_all_forward_all_to_all_backward(take(y_nD, there.place, there.source), trip.back, self.group)
        return weigh(take(y_nD, home.place, home.source).view(t, k, self.etp, D), routing.weights_tk)

    def _run(self, experts: Experts, x_nD: Tensor, counts: list[int]) -> Tensor:
        """Partial sums over the hidden units of this etp rank, of which the first adds the bias, which is not cut."""
        bias = experts.down.bias
        if bias is None or self.group.index % self.etp == 0:
            return experts(x_nD, counts)  # type: ignore[no-any-return]
        return functional_call(experts, {"down.bias": bias * 0}, (x_nD, counts))  # type: ignore[no-any-return]

    def _slots(self, experts_tk: Tensor) -> Tensor:
        """Where each copy of each assignment goes, as rank * held + expert there, for (token, k, j) flattened."""
        rank_tk1 = (experts_tk // self.held * self.etp).unsqueeze(-1)
        rank_tkj = rank_tk1 + torch.arange(self.etp, device=experts_tk.device)
        return (rank_tkj * self.held + (experts_tk % self.held).unsqueeze(-1)).flatten()

    def on_host(self, counts: Tensor) -> Any:
        """Split sizes must be known to the host: the one time that it waits for the device."""
        return counts.tolist()

    def _exchange_counts(self, slots_n: Tensor) -> Counts:
        leaving_re = slots_n.new_zeros(self.group.size * self.held).scatter_add_(0, slots_n, torch.ones_like(slots_n))
        leaving_re = leaving_re.view(self.group.size, self.held)
        arriving_re = torch.empty_like(leaving_re)
        self.group.all_to_all(arriving_re, leaving_re, [1] * self.group.size, [1] * self.group.size)
        leaving, arriving = self.on_host(torch.stack((leaving_re, arriving_re)))
        sums = [sum(row) for row in arriving]
        expert_re = torch.arange(self.held, device=slots_n.device).expand(self.group.size, -1)
        expert_n = expert_re.flatten().repeat_interleave(arriving_re.flatten(), output_size=sum(sums))
        return Counts(
            [sum(row) for row in leaving], sums, [sum(column) for column in zip(*arriving, strict=True)], expert_n
        )


class Counts(NamedTuple):
    """Rows that leave for each rank, that arrive from each rank, that each held expert gets; the expert of each that arrives."""

    leaving: list[int]
    arriving: list[int]
    held: list[int]
    expert_n: Tensor


@dataclass(frozen=True)
class Trip:
    """An uneven all-to-all: rows sent to and received from each rank. `nbytes` is what the ledger is told, either way: the
    array at the tokens' home, which does not depend on what the routers of the other ranks decide."""

    sends: list[int]
    receives: list[int]
    nbytes: int

    @property
    def back(self) -> Trip:
        return Trip(self.receives, self.sends, self.nbytes)


# --- autograd functions -------------------------------------------------------------------------------------------------


def _all_to_all(x_nD: Tensor, trip: Trip, group: Group) -> Tensor:
    out_nD = x_nD.new_empty(sum(trip.receives), x_nD.shape[1])
    group.all_to_all(out_nD, x_nD.contiguous(), trip.receives, trip.sends, nbytes=trip.nbytes)
    return out_nD


def all_to_all_forward_all_to_all_backward(x_nD: Tensor, trip: Trip, group: Group) -> Tensor:
    """Rows sorted by destination become rows sorted by origin; their gradients go the way back."""
    return _AllToAllForwardAllToAllBackward.apply(x_nD, trip, group)  # type: ignore[no-any-return]


class _AllToAllForwardAllToAllBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, trip: Trip, group: Group) -> Tensor:
        ctx.trip, ctx.group = trip, group
        return _all_to_all(x_nD, trip, group)

    @staticmethod
    def backward(ctx: Any, grad_nD: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad_nD, ctx.trip.back, ctx.group), None, None


def slice_forward_all_gather_backward(x: Tensor, group: Group) -> Tensor:
    """This rank's part, along dim 0, of what every rank of the group holds whole."""
    return x if group.size == 1 else _SliceForwardAllGatherBackward.apply(x, group)  # type: ignore[no-any-return]


class _SliceForwardAllGatherBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _part(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gathered(grad, ctx.group), None


def all_gather_forward_slice_backward(x: Tensor, group: Group) -> Tensor:
    """The parts of all ranks, along dim 0; what comes after is computed by every rank alike, so its gradient is whole."""
    return x if group.size == 1 else _AllGatherForwardSliceBackward.apply(x, group)  # type: ignore[no-any-return]


class _AllGatherForwardSliceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _part(grad, ctx.group), None


def _part(x: Tensor, group: Group) -> Tensor:
    return x.unflatten(0, (group.size, -1))[group.index]
