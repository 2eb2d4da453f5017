"""The attention core: what happens between projected queries, keys and values and the output projection.

Shape suffixes: B batch, H query heads, K key-value heads, L tokens here, S tokens of the whole sequence, C head dim of
queries and keys, E head dim of values (they differ under latent attention).
"""

from __future__ import annotations

from collections.abc import Callable
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
        self.kernel: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(
        self, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, where: Where, sinks_H: Tensor | None = None
    ) -> Tensor:
        """Returns y_BHLE. `sinks_H`: a logit for each head that takes part in the softmax and carries no value."""
        grouped = q_BHLC.shape[1] != k_BKLC.shape[1]
        length, width, out_width = q_BHLC.shape[2], q_BHLC.shape[3], v_BKLE.shape[3]
        scale = width**-0.5 if self.scale is None else self.scale
        plain = where.documents_BS is None and (self.window is None or self.window >= length) and sinks_H is None
        mask = None
        if not plain:
            here = where.positions(length, q_BHLC.device)
            documents = where.documents(here)
            mask = visible(here, here, self.window, documents, documents)
        if sinks_H is not None:
            q_BHLC, k_BKLC, v_BKLE = with_sink_key(q_BHLC, k_BKLC, v_BKLE, sinks_H / scale)
            mask = F.pad(mask, (1, 0), value=True)
        narrower = q_BHLC.shape[3] - v_BKLE.shape[3]
        padded = narrower > 0 and q_BHLC.device.type == "cpu" and self.kernel is F.scaled_dot_product_attention
        if padded:  # the fused kernel of CPUs wants keys and values of one width
            v_BKLE = F.pad(v_BKLE, (0, narrower))
        y_BHLE = self.kernel(q_BHLC, k_BKLC, v_BKLE, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=grouped)
        return y_BHLE[..., :out_width]


def with_sink_key(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sink as one more key, the first, whose value is zero, so that any fused kernel serves.

    One more dim makes its score: the sink itself in the queries of its head, 1 in the new key, 0 in all others. `sinks_H` is to
    be divided by the scale. Seven dims of zeros follow, for kernels that want multiples of eight.
    """
    sinks_BHL1 = sinks_H.to(q_BHLC.dtype).view(1, -1, 1, 1).expand(*q_BHLC.shape[:3], 1)
    key_BK1C = F.pad(k_BKLC.new_ones(*k_BKLC.shape[:2], 1, 1), (k_BKLC.shape[3], 7))
    q_BHLC = torch.cat((q_BHLC, F.pad(sinks_BHL1, (0, 7))), dim=-1)
    k_BKLC = torch.cat((key_BK1C, F.pad(k_BKLC, (0, 8))), dim=2)
    return q_BHLC, k_BKLC, F.pad(v_BKLE, (0, 0, 1, 0))
