"""Our RMSNorm is PyTorch's, in values and gradients, and keeps less for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.norm import RMSNorm

EPS = 1e-5


def case(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, RMSNorm, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    norm = RMSNorm(shape[-1], EPS).to(dtype)
    nn.init.normal_(norm.weight, generator=generator)
    return x, norm, grad


def values_and_gradients(x: Tensor, norm: RMSNorm, grad: Tensor, *, ours: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x) if ours else F.rms_norm(x, x.shape[-1:], norm.weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 32), (2, 5, 3, 8)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_pytorchs(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    x, norm, grad = case(dtype, shape)
    mine = values_and_gradients(x, norm, grad, ours=True)
    for got, wanted in zip(mine, values_and_gradients(x, norm, grad, ours=False), strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).double().norm() <= tolerance * wanted.double().norm()


def test_gradients_are_those_of_the_function() -> None:
    x, norm, _ = case(torch.float64, (3, 8))
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x.requires_grad_(), norm.weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_its_input_and_a_number_a_row(dtype: torch.dtype) -> None:
    x, norm, _ = case(dtype, (64, 128))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x.requires_grad_())
    assert sum(kept.values()) == x.nbytes + 4 * len(x) + norm.weight.nbytes
