"""Ring attention: keys and values travel round the ring while each rank attends to those it has (Liu et al. 2023,
arXiv 2310.01889).

Every rank keeps its queries. At step s ring index i has the keys and values of index i - s; it passes them on before it computes
with them, and waits for the next ones after. The blocks' outputs are combined by the log-sum-exp of their scores (section 3). In
backward keys and values go round once more, and their gradients follow one hop behind: what index i has found at step s for
index i - s arrives at i + 1, which computes for the same index at step s + 1; after the last step one more hop brings them home.

What a layer sends on each rank, with R ring ranks and n = B K L (C + E), the elements of its keys and values, s bytes each:

    forward    R - 1 sends of n s                                          keys and values in one message
    backward   R - 1 sends of n s, and R - 1 sends of n max(s, 4)          gradients are summed in fp32 or better

whatever the window or the documents: they save arithmetic, never a hop. Saved for backward: q, k, v, y and a log-sum-exp a query.

Shape suffixes: B batch, H query heads, K key-value heads, L tokens of a rank, S tokens of the whole sequence, C head dim of queries
and keys, E head dim of values, N elements of a block of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshwright.models.attention import visible
from meshwright.parallel.collectives import Group
from meshwright.parallel.kernels import Shown, Softmax, attend, attend_backward
from meshwright.spec.context import Ranges, Tile, context_slices, tiles


@dataclass(frozen=True, eq=False)
class Ring:
    """One rank's place in a ring over sequences of `seq` tokens, and which keys a query sees.

    `documents_BS`: of whole sequences, so that those of every rank are known here.
    """

    group: Group
    seq: int
    scale: float
    window: int | None = None
    documents_BS: Tensor | None = None

    @property
    def steps(self) -> range:
        return range(self.group.size)

    @cached_property
    def blocks(self) -> list[Ranges]:
        """The positions that each ring index holds."""
        return [context_slices(self.seq, self.group.size, 1, i) for i in self.steps]

    def tiles(self, step: int, device: torch.device) -> Iterator[tuple[Tile, Shown]]:
        """What this rank computes with the keys that it has at `step`."""
        mine, theirs = self.blocks[self.group.index], self.blocks[self.group.index - step]
        found = tiles(mine, theirs, self.window, documents=self.documents_BS is not None)
        if any(tile.masked for tile in found):
            queries_L, keys_L = positions_of(mine, device), positions_of(theirs, device)
        for tile in found:
            yield tile, Shown(tile.causal, self._mask(queries_L, keys_L, tile) if tile.masked else None)

    def _mask(self, queries_L: Tensor, keys_L: Tensor, tile: Tile) -> Tensor:
        queries, keys = queries_L[cut(tile.rows)], keys_L[cut(tile.columns)]
        if self.documents_BS is None:
            return visible(queries, keys, self.window)
        return visible(queries, keys, self.window, self.documents_BS[:, queries], self.documents_BS[:, keys])

    def pass_on(self, tensor: Tensor) -> Hop:
        arriving, size, index = torch.empty_like(tensor), self.group.size, self.group.index
        works = self.group.exchange([(tensor, (index + 1) % size)], [(arriving, (index - 1) % size)])
        return Hop(works, tensor, arriving)


@dataclass(frozen=True, eq=False)
class Hop:
    """A message on its way to the next rank, and the one that comes from the previous rank. `leaving` must live until both are
    through."""

    works: list[dist.Work]
    leaving: Tensor
    arriving: Tensor

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


def ring_attention(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, ring: Ring, sinks_H: Tensor | None = None) -> Tensor:
    """Causal attention of this rank's queries over the keys of the whole ring: y_BHLE.

    `sinks_H`: as in `AttentionCore`; their gradient is of this rank's queries alone.
    """
    assert q_BHLC.shape[2] * ring.group.size == ring.seq, "a ring is over equal shares of the sequence"
    return _RingAttention.apply(q_BHLC, k_BKLC, v_BKLE, sinks_H, ring)  # type: ignore[no-any-return]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
        block = Block(k_BKLC.shape, v_BKLE.shape)
        kv_N = block.pack(k_BKLC, v_BKLE)
        y_BHLE, lse_BHL = _softmax_over_ring(q_BHLC, kv_N, block, ring)
        if sinks_H is not None:
            y_BHLE, lse_BHL = _with_sinks(y_BHLE, lse_BHL, sinks_H)
        y_BHLE = y_BHLE.to(q_BHLC.dtype)
        ctx.block, ctx.ring = block, ring
        ctx.save_for_backward(q_BHLC, kv_N, y_BHLE, lse_BHL, sinks_H)
        return y_BHLE

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BHLE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLC, kv_N, y_BHLE, lse_BHL, sinks_H = ctx.saved_tensors
        whole = Softmax(y_BHLE, lse_BHL, dy_BHLE)
        dq_BHLC, dkv_N = _gradients_round_ring(q_BHLC, kv_N, whole, ctx.block, ctx.ring)
        dk_BKLC, dv_BKLE = ctx.block.unpack(dkv_N.to(kv_N.dtype))
        dsinks_H = None if sinks_H is None else _sinks_gradient(whole, sinks_H)
        return dq_BHLC.to(q_BHLC.dtype), dk_BKLC, dv_BKLE, dsinks_H, None


def _softmax_over_ring(q_BHLC: Tensor, kv_N: Tensor, block: Block, ring: Ring) -> tuple[Tensor, Tensor]:
    """y_BHLE and lse_BHL, in fp32 or better.

    A query sees itself, in the first block, so its log-sum-exp is finite when a block comes of which it sees nothing.
    """
    (B, H, L, _), exact = q_BHLC.shape, _exact(q_BHLC.dtype)
    y_BHLE = q_BHLC.new_zeros(B, L, H, block.v_shape[3], dtype=exact).transpose(1, 2)  # as the output projection reads it
    lse_BHL = q_BHLC.new_full((B, H, L), float("-inf"), dtype=exact)
    for step in ring.steps:
        hop = ring.pass_on(kv_N) if step < ring.steps[-1] else None
        k_BKLC, v_BKLE = block.unpack(kv_N)
        for tile, shown in ring.tiles(step, q_BHLC.device):
            rows, columns = cut(tile.rows), cut(tile.columns)
            y_part, lse_part = attend(q_BHLC[:, :, rows], k_BKLC[:, :, columns], v_BKLE[:, :, columns], shown, ring.scale)
            _combine(y_BHLE[:, :, rows], lse_BHL[:, :, rows], y_part, lse_part)
        kv_N = hop.wait() if hop else kv_N
    return y_BHLE, lse_BHL


def _combine(y_BHLE: Tensor, lse_BHL: Tensor, y_part_BHLE: Tensor, lse_part_BHL: Tensor) -> None:
    """In place: the softmax over both sets of keys, each weighted by its share of the sum of exponentials."""
    share_BHL = torch.sigmoid(lse_part_BHL - lse_BHL)
    y_BHLE.lerp_(y_part_BHLE.to(y_BHLE.dtype), share_BHL.unsqueeze(-1))
    torch.logaddexp(lse_BHL, lse_part_BHL, out=lse_BHL)


def _gradients_round_ring(q_BHLC: Tensor, kv_N: Tensor, whole: Softmax, block: Block, ring: Ring) -> tuple[Tensor, Tensor]:
    """dq_BHLC and the gradient of this rank's keys and values dkv_N, in fp32 or better."""
    exact = _exact(q_BHLC.dtype)
    dq_BHLC, home_N = torch.zeros_like(q_BHLC, dtype=exact), torch.zeros_like(kv_N, dtype=exact)
    gradients: Hop | None = None
    for step in ring.steps:
        hop = ring.pass_on(kv_N) if step < ring.steps[-1] else None
        found_N = torch.zeros_like(home_N) if step else home_N
        _add_gradients(dq_BHLC, found_N, q_BHLC, kv_N, whole, block, ring, step)
        if step:
            if gradients is not None:
                found_N += gradients.wait()
            gradients = ring.pass_on(found_N)
        kv_N = hop.wait() if hop else kv_N
    assert gradients is not None, "a ring has more than one rank"
    return dq_BHLC, home_N.add_(gradients.wait())


def _add_gradients(
    dq_BHLC: Tensor,
    dkv_N: Tensor,
    q_BHLC: Tensor,
    kv_N: Tensor,
    whole: Softmax,
    block: Block,
    ring: Ring,
    step: int,
) -> None:
    (k_BKLC, v_BKLE), (dk_BKLC, dv_BKLE) = block.unpack(kv_N), block.unpack(dkv_N)
    for tile, shown in ring.tiles(step, q_BHLC.device):
        rows, columns = cut(tile.rows), cut(tile.columns)
        k_part, v_part = k_BKLC[:, :, columns], v_BKLE[:, :, columns]
        whole_part = Softmax(*(each[:, :, rows] for each in whole))
        dq, dk, dv = attend_backward(q_BHLC[:, :, rows], k_part, v_part, whole_part, shown, ring.scale)
        dq_BHLC[:, :, rows] += dq
        dk_BKLC[:, :, columns] += dk
        dv_BKLE[:, :, columns] += dv


# --- sinks ------------------------------------------------------------------------------------------------------------


def _with_sinks(y_BHLE: Tensor, lse_BHL: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """One more term in every softmax, which has no value."""
    with_sink_BHL = torch.logaddexp(lse_BHL, sinks_H.to(lse_BHL.dtype).unsqueeze(-1))
    return y_BHLE * (lse_BHL - with_sink_BHL).exp().unsqueeze(-1), with_sink_BHL


def _sinks_gradient(whole: Softmax, sinks_H: Tensor) -> Tensor:
    """The gradient of a score is p (dp - sum(dy y)), and a sink's value and so its dp is zero."""
    y_BHLE, lse_BHL, dy_BHLE = whole
    exact = lse_BHL.dtype
    share_BHL = (sinks_H.to(exact).unsqueeze(-1) - lse_BHL).exp()
    return -(share_BHL * (dy_BHLE.to(exact) * y_BHLE).sum(dim=-1)).sum(dim=(0, 2)).to(sinks_H.dtype)


# --- blocks of keys and values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Keys and values of one rank, one behind the other in a message."""

    k_shape: torch.Size
    v_shape: torch.Size

    def pack(self, k_BKLC: Tensor, v_BKLE: Tensor) -> Tensor:
        kv_N = k_BKLC.new_empty(self.k_shape.numel() + self.v_shape.numel())
        for view, value in zip(self.unpack(kv_N), (k_BKLC, v_BKLE), strict=True):
            view.copy_(value)
        return kv_N

    def unpack(self, kv_N: Tensor) -> tuple[Tensor, Tensor]:
        """Views."""
        k_N, v_N = kv_N.split((self.k_shape.numel(), self.v_shape.numel()))
        return k_N.view(self.k_shape), v_N.view(self.v_shape)


def positions_of(ranges: Ranges, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(one.start, one.stop, device=device) for one in ranges])


def cut(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
