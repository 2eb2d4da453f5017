"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) that keeps for backward what a fused kernel keeps, on any device.

Shape suffixes: X any leading dims, D normalised dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dim. PyTorch has a fused kernel on GPUs alone; elsewhere it composes the norm of operators, which
    keep the normalised tensor too and go over memory twice as often."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None, "made with one"
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x), computed in fp32 or better. Keeps x and 1 / rms(x), one number a row.

    With n = x / rms(x):  dw = sum over rows of g n,  dx = (w g - n mean(w g n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        exact_XD = x_XD.to(torch.promote_types(x_XD.dtype, torch.float32))
        length_X1 = torch.linalg.vector_norm(exact_XD, dim=-1, keepdim=True)
        inverse_X1 = length_X1.square_().div_(x_XD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_XD, inverse_X1, weight_D)
        y_XD = exact_XD * inverse_X1
        y_XD *= weight_D
        return y_XD.to(x_XD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_XD, inverse_X1, weight_D = ctx.saved_tensors
        exact_D, exact_XD = weight_D.to(inverse_X1.dtype), grad_XD.to(inverse_X1.dtype)
        normalised_XD = x_XD * inverse_X1
        product_XD = exact_XD * normalised_XD
        dweight_D = product_XD.flatten(0, -2).sum(dim=0)
        mean_X1 = (product_XD @ exact_D).unsqueeze(-1) / x_XD.shape[-1]
        dx_XD = torch.mul(exact_XD, exact_D, out=product_XD)  # the product has served
        dx_XD.addcmul_(normalised_XD, mean_X1, value=-1).mul_(inverse_X1)
        return dx_XD.to(x_XD.dtype), dweight_D.to(weight_D.dtype), None
