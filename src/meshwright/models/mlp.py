"""The gated or plain MLP of a layer, and the activations that experts share with it.

Shape suffixes: B batch, L sequence length, D hidden size, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.spec.model import Model

OAI_SLOPE, OAI_LIMIT = 1.702, 7.0
"""Of GPT-OSS; `spec/families.py` refuses a configuration with others."""


class SharedInput(nn.ModuleDict):
    """Linears that read the same input, in order. Splitting them over ranks costs one collective, not one each."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.values()]


class MLP(nn.Module):
    """`ffn`: the width, which differs between a dense layer and a shared expert."""

    def __init__(self, model: Model, ffn: int):
        super().__init__()
        sizes = dict.fromkeys(up_parts(model), ffn)
        self.gate_up = SharedInput({name: nn.Linear(model.hidden, f, bias=model.mlp_bias) for name, f in sizes.items()})
        self.activate = ACTIVATE[model.activation]
        self.down = nn.Linear(ffn, model.hidden, bias=model.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.leave(self.activate(self.gate_up(x_BLD)))

    def leave(self, h_BLF: Tensor) -> Tensor:
        """From the hidden units."""
        return self.down(h_BLF)  # type: ignore[no-any-return]


def up_parts(model: Model) -> tuple[str, ...]:
    """The matrices that lead into the hidden units."""
    return ("gate", "up") if model.gated else ("up",)


def _activated_times_up(activation: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Of [gate, up], or of [up] alone: the first is activated, and scales the second (Shazeer 2020, arXiv 2002.05202)."""
    first, *rest = parts
    hidden = activation(first)
    return hidden * rest[0] if rest else hidden


def _swiglu_oai(parts: Sequence[Tensor]) -> Tensor:
    """GPT-OSS (model card, arXiv 2508.10925, section 2.2): SwiGLU with clamped inputs and a residual connection in `up`."""
    gate, up = parts
    gate, up = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT)
    return gate * torch.sigmoid(OAI_SLOPE * gate) * (up + 1)


ACTIVATE: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "silu": partial(_activated_times_up, F.silu),
    "gelu": partial(_activated_times_up, F.gelu),
    "gelu_tanh": partial(_activated_times_up, partial(F.gelu, approximate="tanh")),
    "relu": partial(_activated_times_up, F.relu),
    "swiglu_oai": _swiglu_oai,
}
"""From the outputs of `up_parts` to the hidden units."""
