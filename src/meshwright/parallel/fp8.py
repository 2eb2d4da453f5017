"""Linears whose products are made of 8-bit factors: half the bytes and, on GPUs that can, twice the rate of bf16.

Micikevicius et al. 2022, arXiv 2209.05433: four bits of exponent and three of mantissa (e4m3) for weights and activations, five
and two (e5m2) for gradients, whose range is wider. A factor is scaled so that its largest element is among the largest that its format
has, at every use ("per-tensor dynamic scaling"; section 3.2 there). Sums are made in fp32 and rounded to bf16.

Everything else is as in bf16: parameters, activations, collectives, master weights. So are the products that this module does not
make: weight gradients, which are sums over all tokens and suffer most from rounding; attention; routers, experts, embedding and
head; and linears whose sizes do not divide by 16, as the kernels want. Each rank scales its own part of a weight.

The numerics are tested on the CPU, where PyTorch emulates the product; no GPU has run this yet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.spec.errors import UserError
from meshwright.spec.precision import NARROW_MULTIPLE

LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with 8-bit floating-point matrix units (Ada; Hopper is 9.0)."""
ROCM_PREFIXES = ("gfx94", "gfx95")


class Fp8Weight(nn.Parameter):
    """A parameter that is kept in bf16 and multiplied in 8 bits."""


def refuse_fp8(device: torch.device) -> None:
    """Raise UserError unless `device` multiplies 8-bit floating-point numbers."""
    if device.type != "cuda":
        raise _refusal(f"the {device.type.upper()}")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        if not properties.gcnArchName.startswith(ROCM_PREFIXES):
            raise _refusal(f"{properties.name} ({properties.gcnArchName})")
    elif (properties.major, properties.minor) < LEAST_CAPABILITY:
        raise _refusal(f"{properties.name} (compute capability {properties.major}.{properties.minor})")


def _refusal(given: str) -> UserError:
    return UserError(
        f"fp8 linears need 8-bit matrix units: a CUDA GPU of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or more, or "
        f"ROCm {' or '.join(f'{prefix}x' for prefix in ROCM_PREFIXES)}; this rank computes on {given}: take bf16"
    )


def is_eligible(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the weight of this global name, of which a rank holds `shape`, is multiplied in 8 bits."""
    is_linear = name.startswith("layers.") and name.endswith(".weight") and len(shape) == 2 and ".router." not in name
    return is_linear and not any(size % NARROW_MULTIPLE for size in shape)


def fp8_product(x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor | None = None) -> Tensor:
    """x weight^T, rounded to the dtype of x; leading dims of x count as tokens."""
    low, _ = _formats(x_TI.device)
    y_TO = x_TI.new_empty(*x_TI.shape[:-1], weight_OI.shape[0]) if out_TO is None else out_TO
    _scaled_product(y_TO, x_TI, weight_OI.t(), (low, low))
    return y_TO


def fp8_input_gradient(grad_TO: Tensor, weight_OI: Tensor, out_TI: Tensor | None = None) -> Tensor:
    """grad weight, rounded to the dtype of grad; leading dims of grad count as tokens."""
    low, wide = _formats(grad_TO.device)
    dx_TI = grad_TO.new_empty(*grad_TO.shape[:-1], weight_OI.shape[1]) if out_TI is None else out_TI
    _scaled_product(dx_TI, grad_TO, weight_OI, (wide, low))
    return dx_TI


def _scaled_product(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, formats: tuple[torch.dtype, torch.dtype]) -> None:
    """The kernels want the rows of the first factor and the columns of the second one behind the other in memory."""
    (a, a_scale), (b, b_scale) = (
        _quantised(x, dtype) for x, dtype in zip((a_MK.flatten(0, -2), b_KN), formats, strict=True)
    )
    a, b = a.contiguous(), b.t().contiguous().t()
    torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=out_MN.dtype, out=out_MN.flatten(0, -2))


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, and the fp32 scale: the least power of two with which no element is too large. Dividing by it is exact in
    bf16, so that one kernel reads x and writes the 8 bits, rounded once."""
    fill = torch.linalg.vector_norm(x.detach(), torch.inf, dtype=torch.float32) * (1 / torch.finfo(dtype).max)
    scale = torch.exp2(torch.log2(fill.clamp(min=torch.finfo(torch.float32).tiny)).ceil())
    return torch.mul(x.detach(), 1 / scale, out=torch.empty_like(x, dtype=dtype)), scale


def _formats(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """e4m3 and e5m2 as the device has them: the first ROCm GPUs with either lack negative zero and infinity ("fnuz")."""
    if device.type == "cuda" and torch.version.hip and "gfx94" in torch.cuda.get_device_properties(device).gcnArchName:
        return torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
    return torch.float8_e4m3fn, torch.float8_e5m2
