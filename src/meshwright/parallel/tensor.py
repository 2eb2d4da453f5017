"""Tensor parallel, with and without sequence parallel.

A column-parallel set of linears holds rows of its weights and produces a share of the features; a row-parallel linear
consumes that share and its outputs are summed over the tp group (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
With sequence parallel the sum is a reduce-scatter and the way in is an all-gather, so that norms and residuals between
them hold 1/tp of the tokens (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

Shape suffixes: B batch, L sequence, D hidden, T = B*L tokens, t = T/tp tokens of one rank. The sequence-parallel regions
cut the flattened tokens, not the sequence, so gathering them back never copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.decoder import Decoder, Positions
from meshwright.models.latent import LatentAttention
from meshwright.parallel.async_tp import gather_and_multiply, multiply_and_scatter
from meshwright.parallel.collectives import (
    Group,
    all_gather_forward_reduce_scatter_backward,
    all_reduce_forward_identity_backward,
    identity_forward_all_reduce_backward,
    reduce_scatter_forward_all_gather_backward,
)
from meshwright.parallel.linear import WeightGradients, linear, product, sum_of_products
from meshwright.parallel.vocab import VocabParallelEmbedding


def apply_tensor_parallel(
    decoder: Decoder, group: Group, gradients: WeightGradients, *, sequence: bool, micro_batch: int, overlap: bool = False
) -> None:
    """Replace the linears and the embedding of `decoder` by their parallel forms. Parameters keep their names."""
    make = TensorParallel(group, gradients, sequence, micro_batch, overlap)
    for layer in decoder.layers.values():
        if isinstance(layer.attention, LatentAttention):
            _split_latent_attention(layer.attention, make)
        else:
            layer.attention.qkv = make.columns(layer.attention.qkv)
        layer.attention.out = make.row(layer.attention.out)
        if layer.mlp is not None:  # experts are split by `parallel/expert.py`
            layer.mlp.gate_up = make.columns(layer.mlp.gate_up)
            layer.mlp.down = make.row(layer.mlp.down)
    if decoder.embedding is not None:
        tokens, positions = decoder.embedding.tokens, decoder.embedding.positions
        decoder.embedding.tokens = VocabParallelEmbedding(tokens, group, sequence)
        if sequence and positions is not None:
            decoder.embedding.positions = SequenceParallelPositions(positions, group)
    if decoder.head is not None:
        decoder.head = ColumnParallelLinear(decoder.head, make)


def _split_latent_attention(attention: LatentAttention, make: TensorParallel) -> None:
    """The down-projections are whole on every rank; their narrow outputs, not the hidden states, are what all ranks need."""
    if attention.q is not None:
        attention.q = ColumnParallelLinear(attention.q, make)
    else:
        attention.q_down = SharedDown(attention.q_down, make)
    attention.kv_down = SharedDown(attention.kv_down, make)


@dataclass(frozen=True)
class TensorParallel:
    """What all parallel linears of a decoder have in common."""

    group: Group
    gradients: WeightGradients
    sequence: bool
    micro_batch: int
    overlap: bool
    """Sequence parallel's communication in pieces, under the products: `parallel/async_tp.py`."""

    def columns(self, linears: nn.ModuleDict) -> ColumnParallel:
        return ColumnParallel(linears, self)

    def row(self, linear: nn.Linear) -> RowParallel:
        return RowParallel(linear, self)

    def products(self, x: Tensor, weights: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        """y_BL* (y_T* with sequence parallel) of this rank's output features, for each weight."""
        if self.overlap:
            return gather_and_multiply(x, self.group, self.gradients, weights)
        return _ColumnParallelLinears.apply(x, self, *weights)  # type: ignore[no-any-return]


class ColumnParallel(nn.ModuleDict):
    """Linears that read the same input, each with a share of its output features. One collective for all of them."""

    def __init__(self, linears: nn.ModuleDict, shared: TensorParallel):
        super().__init__(linears.items())
        self.shared = shared

    def forward(self, x: Tensor) -> list[Tensor]:
        """x_BLD, or x_tD with sequence parallel; returns a y_BL* for each linear."""
        outputs = self.shared.products(x, [one.weight for one in self.values()])
        if self.shared.sequence:
            outputs = tuple(y.unflatten(0, (self.shared.micro_batch, -1)) for y in outputs)
        return [y if one.bias is None else y + one.bias for y, one in zip(outputs, self.values(), strict=True)]


class ColumnParallelLinear(nn.Module):
    """One linear with a share of its output features. The output head's logits stay cut over the tp group by it."""

    def __init__(self, linear: nn.Linear, shared: TensorParallel):
        super().__init__()
        self.weight, self.shared = linear.weight, shared

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.shared.products(x, [self.weight])
        return y.unflatten(0, (self.shared.micro_batch, -1)) if self.shared.sequence else y


class RowParallel(nn.Module):
    """A linear with a share of its input features; partial outputs are summed over the group, then biased."""

    def __init__(self, linear: nn.Linear, shared: TensorParallel):
        super().__init__()
        self.weight, self.bias, self.shared = linear.weight, linear.bias, shared

    def forward(self, x: Tensor) -> Tensor:
        if self.shared.overlap:
            y = multiply_and_scatter(x.flatten(0, 1), self.shared.group, self.shared.gradients, self.weight)
            return y if self.bias is None else y + self.bias
        y = linear(x, self.weight, None, self.shared.gradients)
        if self.shared.sequence:
            y = reduce_scatter_forward_all_gather_backward(y.flatten(0, 1), self.shared.group)
        else:
            y = all_reduce_forward_identity_backward(y, self.shared.group)
        return y if self.bias is None else y + self.bias


class SharedDown(nn.Module):
    """A linear that every rank holds whole, and whose output every rank uses for its heads: with sequence parallel each computes
    its own tokens' and gathers the rest, else each computes all."""

    def __init__(self, linear: nn.Linear, shared: TensorParallel):
        super().__init__()
        self.weight, self.bias, self.shared = linear.weight, linear.bias, shared

    def forward(self, x: Tensor) -> Tensor:
        """x_BLD, or x_tD with sequence parallel; returns y_BL*."""
        y = linear(x, self.weight, self.bias, self.shared.gradients)
        if not self.shared.sequence:
            return identity_forward_all_reduce_backward(y, self.shared.group)
        y = all_gather_forward_reduce_scatter_backward(y, self.shared.group)
        return y.unflatten(0, (self.shared.micro_batch, -1))


class SequenceParallelPositions(nn.Module):
    """Learned positions for this rank's cut of the flattened tokens."""

    def __init__(self, positions: Positions, group: Group):
        super().__init__()
        self.weight, self.offset, self.group = positions.weight, positions.offset, group

    def forward(self, x_tD: Tensor, positions_L: Tensor) -> Tensor:
        start = self.group.index * x_tD.shape[0]
        mine = torch.arange(start, start + x_tD.shape[0], device=x_tD.device) % len(positions_L)
        return x_tD + F.embedding(positions_L[mine] + self.offset, self.weight)


class _ColumnParallelLinears(torch.autograd.Function):
    """y_i = x W_i^T for several W_i. Backward sums dx over the group while the weight gradients are computed.

    With sequence parallel only this rank's tokens are kept for backward, and gathered again there: saving the gathered
    input would undo the memory that sequence parallelism gains.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: TensorParallel, *weights: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.shared, ctx.weights = shared, weights
        ctx.save_for_backward(x)
        if shared.sequence:
            whole = x.new_empty(shared.group.size * x.shape[0], x.shape[1])
            shared.group.all_gather(whole, x)
            x = whole
        return tuple(product(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,), shared, weights = ctx.saved_tensors, ctx.shared, ctx.weights
        group: Group = shared.group
        regather = None
        if shared.sequence:
            local, x = x, x.new_empty(group.size * x.shape[0], x.shape[1])
            regather = group.all_gather(x, local, wait=False)
        flat = [grad.flatten(0, -2) for grad in grads]
        dx = sum_of_products(flat, weights)
        if shared.sequence:
            dx_out = dx.new_empty(local.shape)
            reduction = group.reduce_scatter(dx_out, dx, wait=False)
            regather.wait()
        else:
            dx_out = dx.view(x.shape)
            reduction = group.all_reduce(dx_out, wait=False)
        for grad, weight in zip(flat, weights, strict=True):
            shared.gradients.add(weight, grad, x)
        reduction.wait()
        return dx_out, None, *(None for _ in weights)
