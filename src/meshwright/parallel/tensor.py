"""Tensor parallel, with and without sequence parallel.

A column-parallel set of linears holds rows of its weights and produces a share of the features; a row-parallel linear
consumes that share and its outputs are summed over the tp group (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
With sequence parallel the sum is a reduce-scatter and the way in is an all-gather, so that norms and residuals between
them hold 1/tp of the tokens (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

Shape suffixes: B batch, L sequence, D hidden, T = B*L tokens, t = T/tp tokens of one rank. The sequence-parallel regions
cut the flattened tokens, not the sequence, so gathering them back never copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.decoder import Decoder, Positions
from meshwright.parallel.collectives import (
    Group,
    all_reduce_forward_identity_backward,
    reduce_scatter_forward_all_gather_backward,
)
from meshwright.parallel.vocab import VocabParallelEmbedding


def apply_tensor_parallel(decoder: Decoder, group: Group, *, sequence: bool, micro_batch: int) -> None:
    """Replace the linears and the embedding of `decoder` by their parallel forms. Parameters keep their names."""
    for layer in decoder.layers.values():
        layer.attention.qkv = ColumnParallel(layer.attention.qkv, group, sequence, micro_batch)
        layer.attention.out = RowParallel(layer.attention.out, group, sequence)
        layer.mlp.gate_up = ColumnParallel(layer.mlp.gate_up, group, sequence, micro_batch)
        layer.mlp.down = RowParallel(layer.mlp.down, group, sequence)
    if decoder.embedding is not None:
        tokens, positions = decoder.embedding.tokens, decoder.embedding.positions
        decoder.embedding.tokens = VocabParallelEmbedding(tokens, group, sequence)
        if sequence and positions is not None:
            decoder.embedding.positions = SequenceParallelPositions(positions, group)
    if decoder.head is not None:
        decoder.head = ColumnParallelHead(decoder.head, group, sequence, micro_batch)


class ColumnParallel(nn.ModuleDict):
    """Linears that read the same input, each with a share of its output features. One collective for all of them."""

    def __init__(self, linears: nn.ModuleDict, group: Group, sequence: bool, micro_batch: int):
        super().__init__(linears.items())
        self.group, self.sequence, self.micro_batch = group, sequence, micro_batch

    def forward(self, x: Tensor) -> list[Tensor]:
        """x_BLD, or x_tD with sequence parallel; returns a y_BL* for each linear."""
        weights = [linear.weight for linear in self.values()]
        outputs = _ColumnParallelLinears.apply(x, self.group, self.sequence, *weights)
        if self.sequence:
            outputs = [y.unflatten(0, (self.micro_batch, -1)) for y in outputs]
        return [y if linear.bias is None else y + linear.bias for y, linear in zip(outputs, self.values(), strict=True)]


class ColumnParallelHead(nn.Module):
    """The output head with a share of the vocabulary: logits stay cut over the tp group."""

    def __init__(self, linear: nn.Linear, group: Group, sequence: bool, micro_batch: int):
        super().__init__()
        self.weight = linear.weight
        self.group, self.sequence, self.micro_batch = group, sequence, micro_batch

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _ColumnParallelLinears.apply(x, self.group, self.sequence, self.weight)
        return y.unflatten(0, (self.micro_batch, -1)) if self.sequence else y


class RowParallel(nn.Module):
    """A linear with a share of its input features; partial outputs are summed over the group, then biased."""

    def __init__(self, linear: nn.Linear, group: Group, sequence: bool):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.sequence:
            y = reduce_scatter_forward_all_gather_backward(y.flatten(0, 1), self.group)
        else:
            y = all_reduce_forward_identity_backward(y, self.group)
        return y if self.bias is None else y + self.bias


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
    def forward(ctx: Any, x: Tensor, group: Group, sequence: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence = group, sequence
        ctx.save_for_backward(x, *weights)
        if sequence:
            whole = x.new_empty(group.size * x.shape[0], x.shape[1])
            group.all_gather(whole, x)
            x = whole
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        group: Group = ctx.group
        regather = None
        if ctx.sequence:
            local, x = x, x.new_empty(group.size * x.shape[0], x.shape[1])
            regather = group.all_gather(x, local, wait=False)
        flat = [grad.flatten(0, -2) for grad in grads]
        dx = flat[0] @ weights[0]
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
        if ctx.sequence:
            dx_out = dx.new_empty(local.shape)
            reduction = group.reduce_scatter(dx_out, dx, wait=False)
            regather.wait()
        else:
            dx_out = dx.view(x.shape)
            reduction = group.all_reduce(dx_out, wait=False)
        x_flat = x.flatten(0, -2)
        dw = [grad.t() @ x_flat for grad in flat]
        reduction.wait()
        return dx_out, None, None, *dw
