"""Matrix products whose weight gradients go straight to where they are kept.

Autograd would make a new tensor of every weight gradient and add it to the bucket afterwards: one more pass over all the
gradients of the model. Here the product of the backward is written into the bucket, or added to it, by the matmul itself.
And because nothing else waits for that product, a zero-bubble schedule can put it off (Qi et al. 2023, arXiv 2401.10241).

Weights are read from the parameter again in backward, not saved by autograd: under ZeRO-3 their memory comes and goes.

Shape suffixes: T tokens, I input features, O output features, E experts of this rank, n rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.parallel.fp8 import Fp8Weight, fp8_input_gradient, fp8_product


class Slot(Protocol):
    """Where the gradient of one weight is kept; see `parallel/data.py`."""

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None: ...

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None: ...


class Later:
    """Products that were put off, in order."""

    def __init__(self) -> None:
        self._products: list[Callable[[], None]] = []

    def append(self, product: Callable[[], None]) -> None:
        self._products.append(product)

    def run(self) -> None:
        """Compute them, once: outside of autograd, where they came up."""
        products, self._products = self._products, []
        with torch.no_grad():
            for product in products:
                product()

    def __len__(self) -> int:
        return len(self._products)


class WeightGradients:
    """Which slot each weight of a rank has, and whether its products are computed at once or later."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._later: Later | None = None

    def keep(self, weight: nn.Parameter, slot: Slot) -> None:
        """From here on the gradient of `weight` belongs to `slot`."""
        self._slots[id(weight)] = slot

    @contextmanager
    def deferred(self) -> Iterator[Later]:
        """Products that come up inside are collected in what this yields, instead of computed."""
        later = Later()
        before, self._later = self._later, later
        try:
            yield later
        finally:
            self._later = before

    def add(self, weight: nn.Parameter, grad: Tensor, x: Tensor) -> None:
        """The gradient grad_TO^T x_TI; leading dims of both count as tokens."""
        slot, grad_TO, x_TI = self._slots[id(weight)], grad.flatten(0, -2), x.flatten(0, -2)
        self._now_or_later(lambda: slot.add_product(grad_TO, x_TI))

    def add_grouped(self, weight: nn.Parameter, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None:
        """The gradient of a stacked weight [E, O, I] from rows sorted by expert, `counts` of each."""
        slot = self._slots[id(weight)]
        self._now_or_later(lambda: slot.add_products(grad_nO, x_nI, counts))

    def _now_or_later(self, product: Callable[[], None]) -> None:
        if self._later is None:
            product()
        else:
            self._later.append(product)


class Linear(nn.Module):
    """`nn.Linear` with its weight gradient in a slot."""

    def __init__(self, linear: nn.Linear, gradients: WeightGradients):
        super().__init__()
        self.weight, self.bias, self.gradients = linear.weight, linear.bias, gradients

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gradients)


def linear(x: Tensor, weight: nn.Parameter, bias: Tensor | None, gradients: WeightGradients) -> Tensor:
    """x_TI weight_OI^T + bias_O; leading dims of x count as tokens."""
    return _Linear.apply(x, weight, bias, gradients)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.gradients = weight, gradients
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        dx = input_gradient(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        ctx.gradients.add(ctx.weight, grad, x)
        dbias = grad.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None


class Linears(nn.ModuleDict):
    """Linears that read the same input: one autograd node, whose backward adds up their parts of dx in the matmuls."""

    def __init__(self, linears: nn.ModuleDict, gradients: WeightGradients):
        super().__init__(linears.items())
        self.gradients = gradients

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = _Linears.apply(x, self.gradients, *(one.weight for one in self.values()))
        return [y if one.bias is None else y + one.bias for y, one in zip(outputs, self.values(), strict=True)]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: WeightGradients, *weights: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.gradients, ctx.weights = gradients, weights
        return tuple(product(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weights = ctx.saved_tensors, ctx.weights
        flat = [grad.flatten(0, -2) for grad in grads]
        dx = sum_of_products(flat, weights)
        for grad, weight in zip(flat, weights, strict=True):
            ctx.gradients.add(weight, grad, x)
        return dx.view(x.shape), None, *(None for _ in weights)


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias, in the precision that the weight is multiplied in; leading dims of x count as tokens."""
    if not isinstance(weight_OI, Fp8Weight):
        return F.linear(x_TI, weight_OI, bias_O)
    y_TO = fp8_product(x_TI, weight_OI)
    return y_TO if bias_O is None else y_TO + bias_O


def product_into(y_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """y becomes x weight^T."""
    if isinstance(weight_OI, Fp8Weight):
        fp8_product(x_TI, weight_OI, y_TO)
    else:
        torch.mm(x_TI, weight_OI.t(), out=y_TO)


def input_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """grad weight; leading dims of grad count as tokens."""
    return fp8_input_gradient(grad_TO, weight_OI) if isinstance(weight_OI, Fp8Weight) else grad_TO @ weight_OI


def input_gradient_into(dx_TI: Tensor, grad_TO: Tensor, weight_OI: Tensor) -> None:
    """dx becomes grad weight."""
    if isinstance(weight_OI, Fp8Weight):
        fp8_input_gradient(grad_TO, weight_OI, dx_TI)
    else:
        torch.mm(grad_TO, weight_OI, out=dx_TI)


def sum_of_products(grads_TO: Sequence[Tensor], weights_OI: Sequence[Tensor]) -> Tensor:
    """dx_TI of linears that read the same x."""
    dx = input_gradient(grads_TO[0], weights_OI[0])
    for grad, weight in zip(grads_TO[1:], weights_OI[1:], strict=True):
        if isinstance(weight, Fp8Weight):
            dx += fp8_input_gradient(grad, weight)
        else:
            dx.addmm_(grad, weight)
    return dx


def grouped_linear(x_nI: Tensor, weight_EOI: nn.Parameter, counts: Sequence[int], gradients: WeightGradients) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix; `counts` rows for each expert, zero allowed. Returns y_nO."""
    return _GroupedLinear.apply(x_nI, weight_EOI, tuple(counts), gradients)  # type: ignore[no-any-return]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nI: Tensor, weight_EOI: nn.Parameter, counts: tuple[int, ...], gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x_nI)
        ctx.weight, ctx.counts, ctx.gradients = weight_EOI, counts, gradients
        y_nO = x_nI.new_empty(x_nI.shape[0], weight_EOI.shape[1])
        for x, w, y in zip(x_nI.split(counts), weight_EOI, y_nO.split(counts), strict=True):
            torch.mm(x, w.t(), out=y)
        return y_nO

    @staticmethod
    def backward(ctx: Any, grad_nO: Tensor) -> tuple[Tensor, None, None, None]:
        (x_nI,) = ctx.saved_tensors
        grad_nO = grad_nO.contiguous()
        dx_nI = torch.empty_like(x_nI)
        for grad, w, dx in zip(grad_nO.split(ctx.counts), ctx.weight.detach(), dx_nI.split(ctx.counts), strict=True):
            torch.mm(grad, w, out=dx)
        ctx.gradients.add_grouped(ctx.weight, grad_nO, x_nI, ctx.counts)
        return dx_nI, None, None, None
