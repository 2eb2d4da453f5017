"""Where the gradient of one shard is put: a view of its bucket's gradients, which the matmul that makes it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meshwright.spec.shards import Shard

if TYPE_CHECKING:
    from meshwright.parallel.bucket import FlatBucket


class GradientSlot:
    """Where the gradient of one shard is kept until its bucket is reduced; a `Slot` of `parallel/linear.py`."""

    def __init__(self, bucket: FlatBucket, shard: Shard, offset: int):
        self.bucket, self.shard, self.offset = bucket, shard, offset
        self.empty = True

    @property
    def view(self) -> Tensor:
        flat = self.bucket.whole_gradients()
        return flat[self.offset : self.offset + self.shard.numel].view(self.shard.shape)

    def add(self, gradient: Tensor) -> None:
        if self.empty:
            self.view.copy_(gradient)
        else:
            self.view.add_(gradient)
        self._added()

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None:
        _product_into(self.view, grad_TO, x_TI, overwrite=self.empty)
        self._added()

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None:
        for view, grad, x in zip(self.view, grad_nO.split(counts), x_nI.split(counts), strict=True):
            _product_into(view, grad, x, overwrite=self.empty)
        self._added()

    def _added(self) -> None:
        self.empty = False
        self.bucket.added()


def _product_into(view: Tensor, grad_TO: Tensor, x_TI: Tensor, *, overwrite: bool) -> None:
    """view_OI = or += grad_TO^T x_TI. The product of half-precision factors is added in the gradient's own precision."""
    if view.dtype != grad_TO.dtype:
        product = grad_TO.t() @ x_TI
        view.copy_(product) if overwrite else view.add_(product)
    elif overwrite:
        torch.mm(grad_TO.t(), x_TI, out=view)
    else:
        view.addmm_(grad_TO.t(), x_TI)
