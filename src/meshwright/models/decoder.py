"""One decoder for the dense families: GPT-2, OPT, Llama, Mistral, Qwen. It knows nothing of parallelism.

Shape suffixes: B batch, L sequence length, D hidden size, H query heads, K key-value heads, C head dim, F MLP width,
V vocabulary. Attention counts its heads from the projections it is given, so a rank may hold a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.attention import EVERYWHERE, AttentionCore, Where
from meshwright.spec.legality import refuse_unrunnable_model
from meshwright.spec.model import Model, Rope


class Decoder(nn.Module):
    """The whole model, or the part of it that a pipeline stage holds.

    `layers`: indices of the layers held. `first` and `last` say whether the embedding and the head are held.
    Input: token ids x_BL if `first`, else hidden states. Output: logits y_BLV if `last`, else hidden states.
    """

    def __init__(self, model: Model, layers: Sequence[int] | None = None, *, first: bool = True, last: bool = True):
        super().__init__()
        refuse_unrunnable_model(model)
        self.model = model
        self.rotary = Rotary(model.rope, model.head_dim) if model.rope else None
        self.embedding = Embedding(model) if first else None
        held = range(model.layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Layer(model, model.window(i), self.rotary) for i in held})
        self.norm = make_norm(model) if last else None
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if last else None
        if model.tied and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.tokens.weight

    def forward(self, x: Tensor, where: Where = EVERYWHERE) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x, where)
        for layer in self.layers.values():
            x = layer(x, where)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


class Embedding(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.tokens = nn.Embedding(model.vocab, model.hidden)
        self.positions = None if model.rope else Positions(model)

    def forward(self, ids_BL: Tensor, where: Where) -> Tensor:
        x = self.tokens(ids_BL)
        return x if self.positions is None else self.positions(x, where.positions(ids_BL.shape[1], ids_BL.device))


class Positions(nn.Embedding):
    """Learned absolute positions, added to the token embeddings."""

    def __init__(self, model: Model):
        super().__init__(model.max_positions + model.position_offset, model.hidden)
        self.offset = model.position_offset

    def forward(self, x: Tensor, positions_L: Tensor) -> Tensor:
        """`x`: x_BLD."""
        return x + F.embedding(positions_L + self.offset, self.weight)


class Layer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, model: Model, window: int | None, rotary: Rotary | None):
        super().__init__()
        self.attention_norm = make_norm(model)
        self.attention = Attention(model, window, rotary)
        self.mlp_norm = make_norm(model)
        self.mlp = MLP(model)

    def forward(self, x_BLD: Tensor, where: Where) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), where)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class SharedInput(nn.ModuleDict):
    """Linears that read the same input, in order. Splitting them over ranks costs one collective, not one each."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.values()]


class Attention(nn.Module):
    """Causal grouped-query attention, optionally with a sliding window and with RMSNorm on queries and keys."""

    def __init__(self, model: Model, window: int | None, rotary: Rotary | None):
        super().__init__()
        self.head_dim = model.head_dim
        self.rotary = rotary
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        sizes = {"q": q, "k": kv, "v": kv}
        self.qkv = SharedInput({name: nn.Linear(model.hidden, size, bias=model.qkv_bias) for name, size in sizes.items()})
        self.q_norm = nn.RMSNorm(model.head_dim, eps=model.norm_eps) if model.qk_norm else None
        self.k_norm = nn.RMSNorm(model.head_dim, eps=model.norm_eps) if model.qk_norm else None
        self.core = AttentionCore(window)
        self.out = nn.Linear(q, model.hidden, bias=model.out_bias)

    def forward(self, x_BLD: Tensor, where: Where) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv(x_BLD))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, where), self.rotary(k, where)
        y_BHLC = self.core(q, k, v, where)
        return self.out(y_BHLC.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        names = ("gate", "up") if model.gated else ("up",)
        self.gate_up = SharedInput({name: nn.Linear(model.hidden, model.ffn, bias=model.mlp_bias) for name in names})
        self.activation = _ACTIVATIONS[model.activation]
        self.down = nn.Linear(model.ffn, model.hidden, bias=model.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        first, *rest = self.gate_up(x_BLD)
        h_BLF = self.activation(first)
        return self.down(h_BLF * rest[0] if rest else h_BLF)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), halves rotated against each other as in Llama."""

    def __init__(self, rope: Rope, head_dim: int):
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BHLC: Tensor, where: Where) -> Tensor:
        cos, sin = self.table(where.length or x_BHLC.shape[2], x_BHLC.device, x_BHLC.dtype)
        if where.positions_L is not None:
            cos, sin = cos[where.positions_L], sin[where.positions_L]
        left, right = x_BHLC.chunk(2, dim=-1)
        return x_BHLC * cos + torch.cat((-right, left), dim=-1) * sin

    def table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [length, head_dim], computed in fp32 (fp64 for fp64 models) and kept for the longest length."""
        key = (device, dtype)
        if key not in self._tables or self._tables[key][0].shape[0] < length:
            with torch.inference_mode(False):  # a later backward would refuse tables made in inference mode
                exact = torch.promote_types(dtype, torch.float32)
                angles = torch.outer(torch.arange(length, device=device, dtype=exact), self.frequencies(device).to(exact))
                angles = torch.cat((angles, angles), dim=-1)
                self._tables[key] = (angles.cos().to(dtype), angles.sin().to(dtype))
        cos, sin = self._tables[key]
        return cos[:length], sin[:length]

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, [head_dim / 2]; long wavelengths stretched by the Llama-3 rule where it is set."""
        even = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float()
        frequency = 1.0 / self.rope.theta ** (even / self.head_dim)
        if self.rope.llama3 is None:
            return frequency
        factor, low, high, original = self.rope.llama3
        wavelength = 2 * math.pi / frequency
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequency / factor + smooth * frequency


def make_norm(model: Model) -> nn.Module:
    kind = nn.RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return kind(model.hidden, eps=model.norm_eps)


def cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Sum over tokens, in fp32 or better; label -100 is ignored."""
    logits = logits_BLV.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels_BL.flatten(), reduction="sum")


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}
