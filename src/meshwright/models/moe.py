"""Mixture of experts on one device: a router sends each token to some experts, whose outputs are weighed and summed.

Parallel forms replace `MoE.dispatch`, `MoE.routed`, `MoE.balanced` and `Experts.product` from outside. The number of
experts and their width are read from the weights, so a rank may hold a share of either.

Shape suffixes: B batch, L sequence length, t tokens, n rows (a token's visit to an expert), D hidden size, E experts,
k experts of a token, F expert width, O and I features out and in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.attention import EVERYWHERE, Where
from meshwright.models.mlp import ACTIVATE, MLP, up_parts
from meshwright.models.routing import (
    Balance,
    Router,
    Routing,
    add_loss,
    balance_loss,
    choose_tokens,
    drop_over_capacity,
    expert_capacity,
    updated_bias,
    z_loss,
)
from meshwright.spec.errors import UserError
from meshwright.spec.model import Model

__all__ = ["Balance", "Experts", "LocalDispatch", "MoE", "Router", "Routing", "add_loss", "updated_bias"]


class MoE(nn.Module):
    """Router, routed experts, and the shared expert that every token visits.

    `balance`: what training asks for; `loss_scale` multiplies the gradients of its losses (the engine's part: a loss is
    the sum over sequences, see `losses`). `length`: tokens of a sequence, for input that is not cut into sequences.
    """

    def __init__(self, model: Model):
        super().__init__()
        assert model.experts is not None, "a layer with experts belongs to a model with experts"
        self.router = Router(model.experts, model.hidden)
        self.experts = Experts(model)
        self.shared = MLP(model, model.experts.shared_ffn) if model.experts.shared_ffn else None
        self.dispatch: nn.Module = LocalDispatch()
        self.balance: Balance | None = None
        self.loss_scale: float | Tensor = 1.0
        self.length: int | None = None
        self.load_E: Tensor | None = None
        """Rows that each expert of the model got from the tokens here since `clear_load`, int64."""
        self._dropped: Tensor | None = None
        self._counts = True

    def forward(self, x: Tensor, where: Where = EVERYWHERE) -> Tensor:
        """x_BLD, or x_tD; returns y of the same shape."""
        if x.dim() == 3:
            self.length = where.length or x.shape[1]
        y = self.routed(x.flatten(0, -2)).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def routed(self, x_tD: Tensor) -> Tensor:
        """The part of the routed experts, y_tD."""
        routing = self.balanced(self.router(x_tD))
        self._count(routing)
        return self.dispatch(x_tD, routing, self.experts)  # type: ignore[no-any-return]

    def balanced(self, routing: Routing) -> Routing:
        """`routing` with the losses attached and the limits applied that `balance` asks for.

        Raises UserError unless the tokens are whole sequences.
        """
        balance = self.balance
        if balance is None:
            return routing
        acts = balance.aux_loss or balance.z_loss or balance.capacity_factor is not None or balance.expert_choice
        if not acts:
            return routing
        tokens, length = len(routing.experts_tk), self.length
        if length is None or tokens % length:
            raise UserError(
                f"experts are balanced sequence by sequence, but the {tokens} tokens of this rank are not whole sequences"
                f"{f' of {length}' if length else ', or their length is not known'}: leave sequences whole (no cp, no tp), or "
                "leave out aux_loss, z_loss, capacity_factor and expert_choice"
            )
        if torch.is_grad_enabled() and (balance.aux_loss or balance.z_loss):
            loss = self.losses(routing, length)
            routing = routing._replace(weights_tk=add_loss(routing.weights_tk, loss, self.loss_scale))
        return self._limited(routing, balance, length)

    def losses(self, routing: Routing, length: int) -> Tensor:
        """Of all the sequences of `length` tokens here, summed, with the factors of `balance`: a scalar."""
        assert self.balance is not None, "losses are an option of Balance"
        aux = balance_loss(routing, length).sum() * self.balance.aux_loss
        return aux + z_loss(routing, length) * self.balance.z_loss

    def _limited(self, routing: Routing, balance: Balance, length: int) -> Routing:
        experts, factor = self.router.experts, balance.capacity_factor
        if balance.expert_choice:
            capacity = expert_capacity(experts, length, 1.0 if factor is None else factor)
            return choose_tokens(routing, length, capacity, experts.scale)
        if factor is None:
            return routing
        return drop_over_capacity(routing, length, expert_capacity(experts, length, factor))

    # --- what happened

    @property
    def dropped(self) -> int:
        """Assignments that capacity refused since `clear_load`. Reading it waits for the device."""
        return 0 if self._dropped is None else int(self._dropped)

    def clear_load(self) -> None:
        self.load_E = self._dropped = None

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """For tokens that have been counted, when backward runs them through again."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _count(self, routing: Routing) -> None:
        if not self._counts:
            return
        experts_n, count = routing.experts_tk.flatten(), routing.logits_tE.shape[1]
        ones_n = torch.ones_like(experts_n) if routing.kept_tk is None else routing.kept_tk.flatten().to(experts_n.dtype)
        load_E = experts_n.new_zeros(count).scatter_add_(0, experts_n, ones_n)
        self.load_E = load_E if self.load_E is None else self.load_E + load_E
        if routing.kept_tk is not None and not (self.balance and self.balance.expert_choice):
            dropped = (~routing.kept_tk).sum()
            self._dropped = dropped if self._dropped is None else self._dropped + dropped


class LocalDispatch(nn.Module):
    """Sorts the tokens' visits by expert and runs all experts, which are here."""

    def forward(self, x_tD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Returns y_tD, each token's weighed sum over its experts. Visits that were dropped are not computed."""
        (t, k), count = routing.experts_tk.shape, routing.logits_tE.shape[1]
        expert_n = routing.experts_tk
        if routing.kept_tk is not None:
            expert_n = expert_n.masked_fill(~routing.kept_tk, count)  # behind all others
        order = Order.by(expert_n.flatten())
        *counts, dropped = self.counted(expert_n.flatten(), count + 1)
        x_nD = take(x_tD, order.source // k, order.place)
        y_nD = experts(x_nD[: len(x_nD) - dropped], counts)
        y_nD = F.pad(y_nD, (0, 0, 0, dropped)) if dropped else y_nD
        return weigh(take(y_nD, order.place, order.source).view(t, k, 1, x_tD.shape[1]), routing.weights_tk)

    def counted(self, expert_n: Tensor, count: int) -> list[int]:
        """How often each of 0..count-1 occurs, on the host."""
        return expert_n.bincount(minlength=count).tolist()  # type: ignore[no-any-return]


class Experts(nn.Module):
    """The MLPs of all experts, each weight stacked on dim 0."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.experts is not None, "a layer with experts belongs to a model with experts"
        E, D, F_, bias = model.experts.count, model.hidden, model.experts.ffn, model.experts.bias
        self.gate_up = nn.ModuleDict({name: Stacked(E, F_, D, bias) for name in up_parts(model)})
        self.activate = ACTIVATE[model.activation]
        self.down = Stacked(E, D, F_, bias)

    def forward(self, x_nD: Tensor, counts_E: Sequence[int] | Tensor) -> Tensor:
        """Rows sorted by expert, `counts_E` of each, zero allowed. Returns y_nD."""
        counts = counts_E.tolist() if isinstance(counts_E, Tensor) else counts_E
        h_nF = self.activate([self._linear(stacked, x_nD, counts) for stacked in self.gate_up.values()])
        return self.leave(h_nF, counts)

    def leave(self, h_nF: Tensor, counts: Sequence[int]) -> Tensor:
        """From the hidden units."""
        return self._linear(self.down, h_nF, counts)

    def _linear(self, stacked: nn.Module, x_nI: Tensor, counts: Sequence[int]) -> Tensor:
        y_nO = self.product(x_nI, stacked.weight, counts)
        return y_nO if stacked.bias is None else y_nO + rows_of(stacked.bias, counts)

    def product(self, x_nI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
        """Each row times its expert's matrix, y_nO. An expert without rows gets a gradient of zeros."""
        if _has_grouped_kernel(x_nI, weight_EOI):
            ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            ends = ends.to(x_nI.device, non_blocking=True)
            return F.grouped_mm(x_nI, weight_EOI.transpose(1, 2), offs=ends)
        pairs = zip(x_nI.split(list(counts)), weight_EOI, strict=True)
        return torch.cat([F.linear(x, weight) for x, weight in pairs])


class Stacked(nn.Module):
    """The weights [E, O, I] and biases [E, O] of one linear of every expert. `Experts` computes with them."""

    def __init__(self, experts: int, out: int, into: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, into))
        self.bias = nn.Parameter(torch.zeros(experts, out)) if bias else None
        nn.init.uniform_(self.weight, -(into**-0.5), into**-0.5)


def rows_of(bias_EO: Tensor, counts: Sequence[int]) -> Tensor:
    """Each expert's bias, once for each of its rows."""
    repeats = torch.tensor(list(counts), device=bias_EO.device)
    return bias_EO.repeat_interleave(repeats, dim=0, output_size=sum(counts))


def _has_grouped_kernel(x_nI: Tensor, weight_EOI: Tensor) -> bool:
    """The fused kernel serves bf16 on CUDA, with rows of 16 bytes' multiples. The loop serves all else, and no rows."""
    aligned = all(size * x_nI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    return x_nI.is_cuda and x_nI.dtype == weight_EOI.dtype == torch.bfloat16 and aligned and len(x_nI) > 0


# --- rows ---------------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """A sort of rows: `source[i]` is the row that comes i-th, `place[n]` where row n comes."""

    source: Tensor
    place: Tensor

    @classmethod
    def by(cls, keys_n: Tensor) -> Order:
        source = keys_n.argsort(stable=True)
        place = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device))
        return cls(source, place)


def take(x: Tensor, source_n: Tensor, place_n: Tensor) -> Tensor:
    """y[i] = x[source_n[i]], every row of x the same number of times. `place_n`: the places in y of row 0, of row 1, ...

    With both ways known, backward gathers as well, where indexing's own would add atomically in no fixed order.
    """
    return _Take.apply(x, source_n, place_n)  # type: ignore[no-any-return]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_mD: Tensor, source_n: Tensor, place_n: Tensor) -> Tensor:
        ctx.save_for_backward(place_n)
        ctx.rows = x_mD.shape[0]
        return x_mD[source_n]

    @staticmethod
    def backward(ctx: Any, grad_nD: Tensor) -> tuple[Tensor, None, None]:
        (place_n,) = ctx.saved_tensors
        grads = grad_nD[place_n]
        if len(place_n) != ctx.rows:
            grads = grads.unflatten(0, (ctx.rows, -1)).sum(dim=1)
        return grads, None, None


def weigh(y_tkjD: Tensor, weights_tk: Tensor) -> Tensor:
    """The sum over k of weight times the sum over j of y, in fp32 or better; y_tD in the dtype of y.

    j: partial sums of one expert's output, where ranks share an expert; else 1.
    """
    return _Weigh.apply(y_tkjD, weights_tk)  # type: ignore[no-any-return]


class _Weigh(torch.autograd.Function):
    """Keeps y for backward in its own dtype, where plain operators would keep the fp32 copy."""

    @staticmethod
    def forward(ctx: Any, y_tkjD: Tensor, weights_tk: Tensor) -> Tensor:
        ctx.save_for_backward(y_tkjD, weights_tk)
        exact = torch.promote_types(y_tkjD.dtype, torch.float32)
        return torch.einsum("tkjd,tk->td", y_tkjD.to(exact), weights_tk.to(exact)).to(y_tkjD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_tD: Tensor) -> tuple[Tensor, Tensor]:
        y_tkjD, weights_tk = ctx.saved_tensors
        exact = torch.promote_types(y_tkjD.dtype, torch.float32)
        grad_exact_tD = grad_tD.to(exact)
        dweights_tk = torch.einsum("tkjd,td->tk", y_tkjD.to(exact), grad_exact_tD)
        dy_tkD = torch.einsum("tk,td->tkd", weights_tk.to(exact), grad_exact_tD).to(y_tkjD.dtype)
        return dy_tkD.unsqueeze(2).expand_as(y_tkjD), dweights_tk.to(weights_tk.dtype)
