"""Context parallel: each rank of cp holds a part of the sequence, and attention is done by a ring, by all-to-alls over heads, or by
both: all-to-alls among the innermost ranks, outside a ring over the heads that they then have.

`ring.py` and `ulysses.py` say what each sends; with both, the ring has K copies / ulysses key-value heads and ulysses L tokens.
Every other operator of a decoder works on tokens one by one and needs only to be told their positions.

Shape suffixes: B batch, H query heads, K key-value heads, L tokens of this rank, S tokens of the whole sequence, C head dim of
queries and keys, E head dim of values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.models.attention import AttentionCore, Where
from meshwright.parallel.collectives import Group
from meshwright.parallel.ring import Ring, cut, positions_of, ring_attention
from meshwright.parallel.ulysses import gather_heads_scatter_tokens, gather_tokens_scatter_heads
from meshwright.spec.context import context_slices
from meshwright.spec.layout import Layout


def cut_where(documents_BS: Tensor | None, seq: int, layout: Layout, index: int, device: torch.device) -> Where:
    """Where the tokens of cp index `index` stand in sequences of `seq` tokens. `documents_BS`: see `Where`."""
    return Where(positions_of(context_slices(seq, layout.cp_ring, layout.cp_ulysses, index), device), seq, documents_BS)


def cut_tokens(x_BS: Tensor, layout: Layout, index: int) -> Tensor:
    """x_BL: the tokens (or labels) of cp index `index`, of whole sequences."""
    held = context_slices(x_BS.shape[1], layout.cp_ring, layout.cp_ulysses, index)
    return torch.cat([x_BS[:, cut(one)] for one in held], dim=1)


class ContextParallelCore(nn.Module):
    """Replaces the `AttentionCore` of a layer whose tokens are cut as `cut_tokens` does.

    `ring` and `ulysses`: the two parts of the cp group; None, or a group of one rank, where cp has no such part.
    """

    def __init__(self, core: AttentionCore, ring: Group | None, ulysses: Group | None):
        super().__init__()
        self.core = core
        self.ring, self.ulysses = (None if part is None or part.size == 1 else part for part in (ring, ulysses))

    def forward(
        self, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, where: Where, sinks_H: Tensor | None = None
    ) -> Tensor:
        """Returns y_BHLE. The gradient of `sinks_H` is this rank's part of a sum over cp."""
        if self.ulysses is None:
            return self._share_of_heads(q_BHLC, k_BKLC, v_BKLE, where, sinks_H)
        q, k, v = gather_tokens_scatter_heads(q_BHLC, k_BKLC, v_BKLE, self.ulysses)
        if sinks_H is not None:
            sinks_H = sinks_H.chunk(self.ulysses.size)[self.ulysses.index]
        return gather_heads_scatter_tokens(self._share_of_heads(q, k, v, where, sinks_H), self.ulysses)

    def _share_of_heads(self, q: Tensor, k: Tensor, v: Tensor, where: Where, sinks: Tensor | None) -> Tensor:
        """Attention among all tokens of a ring rank, which has them in order; without a ring they are the whole sequence."""
        if self.ring is None:
            whole: Tensor = self.core(q, k, v, Where(documents_BS=where.documents_BS), sinks)
            return whole
        seq, window = q.shape[2] * self.ring.size, self.core.window
        assert where.length in (None, seq), "the positions of the rank's tokens are those of cut_where"
        scale = q.shape[3] ** -0.5 if self.core.scale is None else self.core.scale
        if window is not None and window >= seq:
            window = None
        return ring_attention(q, k, v, Ring(self.ring, seq, scale, window, where.documents_BS), sinks)
