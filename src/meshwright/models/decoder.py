"""One decoder for all families: GPT-2, OPT, Llama, Mistral, Qwen, Mixtral, DeepSeek, GPT-OSS. It knows nothing of parallelism.

Shape suffixes: B batch, L sequence length, D hidden size, H query heads, K key-value heads, C head dim,
V vocabulary. Attention counts its heads from the projections it is given, so a rank may hold a share of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.attention import EVERYWHERE, AttentionCore, Where
from meshwright.models.latent import LatentAttention
from meshwright.models.mlp import MLP, SharedInput
from meshwright.models.moe import MoE
from meshwright.models.norm import RMSNorm
from meshwright.models.rotary import Rotary
from meshwright.spec.legality import refuse_unrunnable_model
from meshwright.spec.model import Model


class Decoder(nn.Module):
    """The whole model, or the part of it that a pipeline stage holds.

    `layers`: indices of the layers held. `first` and `last` say whether the embedding and the head are held.
    Input: token ids x_BL if `first`, else hidden states. Output: logits y_BLV if `last`, else hidden states.
    """

    def __init__(self, model: Model, layers: Sequence[int] | None = None, *, first: bool = True, last: bool = True):
        super().__init__()
        refuse_unrunnable_model(model)
        self.model = model
        self.rotary = make_rotary(model)
        self.embedding = Embedding(model) if first else None
        held = range(model.layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Layer(model, i, self.rotary) for i in held})
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
    """Pre-norm transformer block. It has either an `mlp` or, with experts, a `moe`."""

    def __init__(self, model: Model, index: int, rotary: Rotary | None):
        super().__init__()
        self.attention_norm = make_norm(model)
        if model.latent is None:
            self.attention: nn.Module = Attention(model, model.window(index), rotary)
        else:
            self.attention = LatentAttention(model, model.window(index), rotary)
        self.mlp_norm = make_norm(model)
        sparse = model.is_moe(index)
        self.mlp = None if sparse else MLP(model, model.ffn)
        self.moe = MoE(model) if sparse else None

    def forward(self, x_BLD: Tensor, where: Where) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), where)
        h_BLD = self.mlp_norm(x_BLD)
        return x_BLD + (self.mlp(h_BLD) if self.moe is None else self.moe(h_BLD, where))


class Attention(nn.Module):
    """Causal grouped-query attention, optionally with a sliding window, with RMSNorm on queries and keys, and with sinks."""

    def __init__(self, model: Model, window: int | None, rotary: Rotary | None):
        super().__init__()
        self.head_dim = model.head_dim
        self.rotary = rotary
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        sizes = {"q": q, "k": kv, "v": kv}
        self.qkv = SharedInput({name: nn.Linear(model.hidden, size, bias=model.qkv_bias) for name, size in sizes.items()})
        self.q_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else None
        self.k_norm = RMSNorm(model.head_dim, model.norm_eps) if model.qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(model.heads)) if model.sinks else None
        self.core = AttentionCore(window)
        self.out = nn.Linear(q, model.hidden, bias=model.out_bias)

    def forward(self, x_BLD: Tensor, where: Where) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv(x_BLD))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, where), self.rotary(k, where)
        y_BHLC = self.core(q, k, v, where, self.sinks)
        return self.out(y_BHLC.transpose(1, 2).flatten(2))


def make_rotary(model: Model) -> Rotary | None:
    if model.rope is None:
        return None
    if model.latent is None:
        return Rotary(model.rope, model.head_dim)
    return Rotary(model.rope, model.latent.rope_dim, interleaved=True)


def make_norm(model: Model) -> nn.Module:
    kind = RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return kind(model.hidden, eps=model.norm_eps)


def cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Sum over tokens, in fp32 or better; label -100 is ignored."""
    logits = logits_BLV.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels_BL.flatten(), reduction="sum")
