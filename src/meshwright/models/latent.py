"""Multi-head latent attention: keys and values of all heads come from one small vector a token.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Written out, as for training: every head gets keys and values of its own, and
the core is that of ordinary attention.

Shape suffixes: B batch, L sequence length, D hidden size, H heads, N dims of a head without position, R with, C = N + R,
E head dim of values, K width of the latent vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.models.attention import AttentionCore, Where
from meshwright.models.norm import RMSNorm
from meshwright.models.rotary import Rotary
from meshwright.spec.model import Model

LATENT_NORM_EPS = 1e-6
"""Of the norms of latent vectors, whatever the model's other norms have: so in DeepSeek's code and in transformers."""


class LatentAttention(nn.Module):
    """Heads are counted from `q_up` (or `q`) and `kv_up`, so a rank may hold a share of them."""

    def __init__(self, model: Model, window: int | None, rotary: Rotary):
        super().__init__()
        latent = model.latent
        assert latent is not None, "a model with latent attention says how"
        self.nope_dim, self.rope_dim, self.value_dim = latent.nope_dim, latent.rope_dim, latent.value_dim
        self.kv_rank, self.rotary = latent.kv_rank, rotary
        queries = model.heads * (latent.nope_dim + latent.rope_dim)
        self.q = nn.Linear(model.hidden, queries, bias=False) if latent.q_rank is None else None
        if latent.q_rank is not None:
            self.q_down = nn.Linear(model.hidden, latent.q_rank, bias=model.qkv_bias)
            self.q_down_norm = RMSNorm(latent.q_rank, LATENT_NORM_EPS)
            self.q_up = nn.Linear(latent.q_rank, queries, bias=False)
        self.kv_down = nn.Linear(model.hidden, latent.kv_rank + latent.rope_dim, bias=model.qkv_bias)
        self.kv_down_norm = RMSNorm(latent.kv_rank, LATENT_NORM_EPS)
        self.kv_up = nn.Linear(latent.kv_rank, model.heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.core = AttentionCore(window, latent_scale(model))
        self.out = nn.Linear(model.heads * latent.value_dim, model.hidden, bias=model.out_bias)

    def forward(self, x_BLD: Tensor, where: Where) -> Tensor:
        q_BHLC = self._queries(x_BLD, where)
        k_BHLC, v_BHLE = self._keys_and_values(x_BLD, where)
        y_BHLE = self.core(q_BHLC, k_BHLC, v_BHLE, where)
        return self.out(y_BHLE.transpose(1, 2).flatten(2))

    def _queries(self, x_BLD: Tensor, where: Where) -> Tensor:
        q = self.q_up(self.q_down_norm(self.q_down(x_BLD))) if self.q is None else self.q(x_BLD)
        q_BHLC = q.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).transpose(1, 2)
        nope_BHLN, rope_BHLR = q_BHLC.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((nope_BHLN, self.rotary(rope_BHLR, where)), dim=-1)

    def _keys_and_values(self, x_BLD: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        latent_BLK, rope_BLR = self.kv_down(x_BLD).split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.kv_up(self.kv_down_norm(latent_BLK)).unflatten(-1, (-1, self.nope_dim + self.value_dim)).transpose(1, 2)
        nope_BHLN, v_BHLE = kv.split((self.nope_dim, self.value_dim), dim=-1)
        rope_B1LR = self.rotary(rope_BLR.unsqueeze(1), where)  # one for all heads
        k_BHLC = torch.cat((nope_BHLN, rope_B1LR.expand(-1, nope_BHLN.shape[1], -1, -1)), dim=-1)
        return k_BHLC, v_BHLE.contiguous()  # a view would keep all of kv for backward


def latent_scale(model: Model) -> float:
    """What multiplies a score: 1 / sqrt(head_dim), and YaRN's factor."""
    yarn = model.rope.yarn if model.rope else None
    return model.head_dim**-0.5 * (yarn.score_factor if yarn else 1.0)
