"""Rotary positions (Su et al. 2021, arXiv 2104.09864), with the rules of Llama 3.1 and of YaRN for longer sequences.

Shape suffixes: B batch, H heads, L tokens here, C rotated dims of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meshwright.models.attention import Where
from meshwright.spec.model import Rope, Yarn


class Rotary(nn.Module):
    """Turns `dims` dims of queries and keys by angles that grow with the position.

    Dim i turns against dim i + dims/2, as in Llama; `interleaved`, dim 2i against dim 2i + 1, as in DeepSeek.
    """

    def __init__(self, rope: Rope, dims: int, *, interleaved: bool = False):
        super().__init__()
        self.rope, self.dims, self.interleaved = rope, dims, interleaved
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BHLC: Tensor, where: Where) -> Tensor:
        cos, sin = self.table(where.length or x_BHLC.shape[2], x_BHLC.device, x_BHLC.dtype)
        if where.positions_L is not None:
            cos, sin = cos[where.positions_L], sin[where.positions_L]
        return x_BHLC * cos + self._quarter_turn(x_BHLC) * sin

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        left, right = x.chunk(2, dim=-1)
        return torch.cat((-right, left), dim=-1)

    def table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, dims], computed in fp32 (fp64 for fp64 models) and kept for the longest length."""
        key = (device, dtype)
        if key not in self._tables or self._tables[key][0].shape[0] < length:
            with torch.inference_mode(False):  # a later backward would refuse tables made in inference mode
                self._tables[key] = self._make_table(length, device, dtype)
        cos, sin = self._tables[key]
        return cos[:length], sin[:length]

    def _make_table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        angles = torch.outer(torch.arange(length, device=device, dtype=exact), self.frequencies(device).to(exact))
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        factor = self.rope.yarn.attention_factor if self.rope.yarn else 1.0
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, [dims / 2]."""
        even = torch.arange(0, self.dims, 2, dtype=torch.int64, device=device).float()
        frequency = 1.0 / self.rope.theta ** (even / self.dims)
        if self.rope.llama3 is not None:
            return _llama3(frequency, *self.rope.llama3)
        if self.rope.yarn is not None:
            return _yarn(frequency, self.rope.yarn, self.rope.theta)
        return frequency


def _llama3(frequency: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequency
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequency: Tensor, yarn: Yarn, theta: float) -> Tensor:
    """Blended by a ramp over the index of the dim (arXiv 2309.00071, section 3.2)."""
    dims = 2 * len(frequency)

    def index(turns: float) -> float:
        """Of the dim that turns so often within the original positions."""
        return dims * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(yarn.beta_fast), index(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp, as in the reference code
    slowed = ((torch.arange(len(frequency), dtype=torch.float32, device=frequency.device) - first) / (last - first)).clamp(
        0, 1
    )
    return slowed * frequency / yarn.factor + (1 - slowed) * frequency
