"""Sequence-parallel linears whose communication is cut into pieces that travel under the products of the others.

With `tp4:sp` a column-parallel linear waits for an all-gather of its input, and a row-parallel one for a reduce-scatter of its
output. Here both go round a ring, one rank's tokens a hop (Wang et al. 2023, "Overlap communication with dependent computation
via decomposition in large deep learning models", ASPLOS; PyTorch calls it async tensor parallel, Megatron `tp_comm_overlap`):

    gather and multiply     pass on the tokens that are here, multiply them, wait for the next ones
    multiply and scatter    multiply the tokens of the rank that is farthest ahead, add what came from behind, pass it on; the last
                            are this rank's own

The backward of either is the other one. The bytes on the wire are those of the collectives: with n ranks, n - 1 sends of 1/n of
the gathered array. What is saved for backward is what `parallel/tensor.py` saves.

Shape suffixes: t tokens of one rank, T = n t tokens of the group, D hidden, I input features, O output features, X any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.parallel.collectives import Group
from meshwright.parallel.linear import WeightGradients, input_gradient_into, product, product_into, sum_of_products


def gather_and_multiply(
    x_tD: Tensor, group: Group, gradients: WeightGradients, weights_OD: Sequence[nn.Parameter]
) -> tuple[Tensor, ...]:
    """y_TO for each weight, of the tokens of all ranks."""
    return _GatherAndMultiply.apply(x_tD, group, gradients, *weights_OD)  # type: ignore[no-any-return]


def multiply_and_scatter(x_TI: Tensor, group: Group, gradients: WeightGradients, weight_OI: nn.Parameter) -> Tensor:
    """This rank's tokens y_tO of the sum over the group of x weight^T."""
    return _MultiplyAndScatter.apply(x_TI, group, gradients, weight_OI)  # type: ignore[no-any-return]


class _GatherAndMultiply(torch.autograd.Function):
    """Only this rank's tokens are kept, and gathered again in backward, under the products that make dx."""

    @staticmethod
    def forward(
        ctx: Any, x_tD: Tensor, group: Group, gradients: WeightGradients, *weights_OD: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_tD)
        ctx.group, ctx.gradients, ctx.weights = group, gradients, weights_OD
        outputs = tuple(x_tD.new_empty(group.size * len(x_tD), len(weight)) for weight in weights_OD)
        x_TD = _whole_like(x_tD, group)
        for rank in _arrivals(x_tD, x_TD, group):
            for weight_OD, y_TO in zip(weights_OD, outputs, strict=True):
                product_into(_piece(y_TO, rank, group), _piece(x_TD, rank, group), weight_OD)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads_TO: Tensor) -> tuple[Any, ...]:
        (x_tD,), group, weights_OD = ctx.saved_tensors, ctx.group, ctx.weights
        x_TD = _whole_like(x_tD, group)
        regathered = _arrivals(x_tD, x_TD, group)

        def dx_of(rank: int) -> Tensor:
            next(regathered)  # one hop under each of these products
            return sum_of_products([_piece(grad_TO, rank, group) for grad_TO in grads_TO], weights_OD)

        dx_tD = _scattered_sum(dx_of, group)
        for grad_TO, weight_OD in zip(grads_TO, weights_OD, strict=True):
            ctx.gradients.add(weight_OD, grad_TO, x_TD)
        return dx_tD, None, None, *(None for _ in weights_OD)


class _MultiplyAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, group: Group, gradients: WeightGradients, weight_OI: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x_TI)
        ctx.group, ctx.gradients, ctx.weight = group, gradients, weight_OI
        return _scattered_sum(lambda rank: product(_piece(x_TI, rank, group), weight_OI), group)

    @staticmethod
    def backward(ctx: Any, grad_tO: Tensor) -> tuple[Any, ...]:
        (x_TI,), group, weight_OI = ctx.saved_tensors, ctx.group, ctx.weight
        grad_TO, dx_TI = _whole_like(grad_tO, group), torch.empty_like(x_TI)
        for rank in _arrivals(grad_tO, grad_TO, group):
            input_gradient_into(_piece(dx_TI, rank, group), _piece(grad_TO, rank, group), weight_OI)
        ctx.gradients.add(weight_OI, grad_TO, x_TI)
        return dx_TI, None, None, None


# --- once round the ring ----------------------------------------------------------------------------------------------


def _arrivals(mine_tX: Tensor, whole_TX: Tensor, group: Group) -> Iterator[int]:
    """Fill `whole_TX` with every rank's tokens, this rank's first; yields whose are there, already on their way to the next rank.
    What the caller computes before it asks for the next is computed under that hop."""
    _piece(whole_TX, group.index, group).copy_(mine_tX)
    works: list[dist.Work] = []
    for step in range(group.size):
        for work in works:
            work.wait()
        here, coming = (group.index - step) % group.size, (group.index - step - 1) % group.size
        if step < group.size - 1:
            sends = [(_piece(whole_TX, here, group), (group.index + 1) % group.size)]
            receives = [(_piece(whole_TX, coming, group), (group.index - 1) % group.size)]
            works = group.exchange(sends, receives)
        yield here


def _scattered_sum(product: Callable[[int], Tensor], group: Group) -> Tensor:
    """The sum over the ranks of their `product(this rank)`, of which each rank computes the others' first. Every product is computed
    under the hop that brings the sum of it so far."""
    ahead, behind = (group.index + 1) % group.size, (group.index - 1) % group.size
    total_tX = product(behind)
    for step in range(1, group.size):
        leaving_tX, arriving_tX = total_tX, torch.empty_like(total_tX)  # the first must live until it has left
        works = group.exchange([(leaving_tX, ahead)], [(arriving_tX, behind)])
        total_tX = product((behind - step) % group.size)
        for work in works:
            work.wait()
        total_tX += arriving_tX
    return total_tX


def _piece(whole_TX: Tensor, rank: int, group: Group) -> Tensor:
    """The tokens of one rank, a view."""
    return whole_TX.chunk(group.size)[rank]


def _whole_like(piece_tX: Tensor, group: Group) -> Tensor:
    return piece_tX.new_empty(group.size * piece_tX.shape[0], piece_tX.shape[1])
