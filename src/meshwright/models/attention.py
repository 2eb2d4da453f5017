"""The attention core: what happens between projected queries, keys and values and the output projection.

Shape suffixes: B batch, H query heads, K key-value heads, L tokens here, S tokens of the whole sequence, C head dim of
queries and keys, E head dim of values (they differ under latent attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Where:
    """Where the tokens of a micro-batch stand in their sequences.

    `positions_L`: each token's place in a sequence of `length` tokens, the same for every sequence of the batch; None, both:
    the whole sequence is here, in order. `documents_BS`: which document each token of the whole sequence belongs to; a token
    sees its own document only. None: one document a sequence.
    """

    positions_L: Tensor | None = None
    length: int | None = None
    documents_BS: Tensor | None = None

    def positions(self, length: int, device: torch.device) -> Tensor:
        return torch.arange(length, device=device) if self.positions_L is None else self.positions_L

    def documents(self, positions: Tensor) -> Tensor | None:
        """The documents of the tokens at `positions`, [B, len(positions)]."""
        return None if self.documents_BS is None else self.documents_BS[:, positions]


EVERYWHERE = Where()


def visible(
    queries_L: Tensor,
    keys_M: Tensor,
    window: int | None,
    query_documents_BL: Tensor | None = None,
    key_documents_BM: Tensor | None = None,
) -> Tensor:
    """Which keys a query sees, by position: those before it or at it, in its window and its document. [L, M], or
    [B, 1, L, M] with documents."""
    distance = queries_L.unsqueeze(-1) - keys_M
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if query_documents_BL is None or key_documents_BM is None:
        return seen
    same = query_documents_BL.unsqueeze(-1) == key_documents_BM.unsqueeze(-2)
    return (seen & same).unsqueeze(1)


class AttentionCore(nn.Module):
    """Causal attention of queries over keys and values that are all here. Parallel forms replace it."""

    def __init__(self, window: int | None, scale: float | None = None):
        super().__init__()
        self.window, self.scale = window, scale

    def forward(self, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, where: Where, sinks_H: Tensor | None = None) -> Tensor:
        """Returns y_BHLE. `sinks_H`: a logit for each head that takes part in the softmax and carries no value."""
        assert sinks_H is None, "attention sinks are not built yet"
        grouped = q_BHLC.shape[1] != k_BKLC.shape[1]
        length = q_BHLC.shape[2]
        plain = where.documents_BS is None and (self.window is None or self.window >= length)
        mask = None
        if not plain:
            here = where.positions(length, q_BHLC.device)
            documents = where.documents(here)
            mask = visible(here, here, self.window, documents, documents)
        return F.scaled_dot_product_attention(
            q_BHLC, k_BKLC, v_BKLE, attn_mask=mask, is_causal=plain, scale=self.scale, enable_gqa=grouped
        )
