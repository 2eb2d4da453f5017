"""Outputs that are made again in backward from inputs that are kept anyway: those of norms and of activations.

PyTorch's checkpoint makes again what lies inside a part, but such an output is kept by what comes after it, the linear that reads
it. So the linear is told to keep a handle in its place: autograd's hooks on saved tensors find the output by its memory, and
backward gets it from the handle (what Megatron calls a checkpoint without output). Products are never computed again.

Shape suffixes: X any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshwright.models.mlp import MLP
from meshwright.models.moe import Experts


def norm_again(norm: Callable[[Tensor], Tensor], reader: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """reader(norm(x), ...) as a function of x, of which backward norms x again wherever the reader's backward needs the output."""

    def forward(x: Tensor, *rest: Any) -> Tensor:
        y, given = norm(x), x.detach()
        with _made_again(y, lambda: norm(given)):
            return reader(y, *rest)

    return forward


def activation_again(mlp: MLP | Experts) -> None:
    """Hidden units, and what the activation itself keeps, are made again from the outputs of gate and up."""
    made: list[_Activation] = []  # by the activation, for the product that comes after it
    mlp.activate = partial(_activate, mlp.activate, made)
    product = mlp.leave

    def leave(h: Tensor, *rest: Any) -> Tensor:
        activation = made.pop()
        with _made_again(h, activation.output):
            return product(h, *rest)

    mlp.leave = leave  # type: ignore[method-assign]


def _made_again(output: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Inside, whatever keeps (a view of) `output` keeps its shape, and calls `make` for the rest in backward."""
    memory = output.untyped_storage()._cdata

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if kept.untyped_storage()._cdata != memory:
            return kept
        return kept.shape, kept.stride(), kept.storage_offset()

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().detach().as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)


def _activate(activate: Callable[[Sequence[Tensor]], Tensor], made: list[_Activation], parts: Sequence[Tensor]) -> Tensor:
    activation = _Activation(activate, parts)
    made.append(activation)
    return _Activate.apply(activation, *parts)  # type: ignore[no-any-return]


class _Activation:
    """One call of an activation, made again once: first for the product that reads its output, then for its own backward."""

    def __init__(self, activate: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Tensor]):
        self.activate = activate
        self.parts = [part.detach() for part in parts]
        self._again: Tensor | None = None

    def output(self) -> Tensor:
        if self._again is None:
            with torch.enable_grad():
                self.parts = [part.requires_grad_() for part in self.parts]
                self._again = self.activate(self.parts)
        return self._again

    def gradients(self, grad_X: Tensor) -> tuple[Tensor, ...]:
        """Of the parts. Lets go of them."""
        again, parts = self.output(), self.parts
        self._again, self.parts = None, []
        return torch.autograd.grad(again, parts, grad_X)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: _Activation, *parts: Tensor) -> Tensor:
        ctx.activation = activation
        return activation.activate(activation.parts)

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.activation.gradients(grad_X)
