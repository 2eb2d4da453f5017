"""Initial weights that depend on the seed and the parameter's name alone, so never on the layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from meshwright.spec.model import Model

INIT_STD = 0.02


def initial_value(model: Model, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole parameter in fp32 on the CPU: normal(0, 0.02), projections back into the residual stream scaled by
    1 / sqrt(2 layers) (GPT-2, Radford et al. 2019, section 2.3), norms at one and biases at zero.

    Attention sinks start at zero, as one more key that scores like an average one.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if len(shape) == 1 or name.endswith(".bias"):
        return torch.zeros(shape)
    residual = name.endswith(("attention.out.weight", ".down.weight"))
    std = INIT_STD / (2 * model.layers) ** 0.5 if residual else INIT_STD
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator).mul_(std)
