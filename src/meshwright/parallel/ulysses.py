"""Ulysses: for attention, a share of the tokens with all heads becomes all tokens with a share of the heads, and back (Jacobs et
al. 2023, arXiv 2309.14509, section 3.1).

Where there are fewer key-value heads than ranks, each is sent to every rank whose query heads read it, and its gradient is the
sum of what they send back.

What a layer sends on each rank of u, L tokens before the first all-to-all, s bytes an element, `copies` as `spec.context.kv_copies`:

    forward    an all-to-all of B L (H C + K copies (C + E)) s       queries, keys and values in one
               an all-to-all of B L H E s                            outputs
    backward   the same two, in the other order

The ledger counts the whole input of an all-to-all, of which (u - 1)/u leave the rank. There is no copy but into the buffers that
are sent, out of those that arrive with outputs and gradients, and, with more than one sequence, of what arrives.

Shape suffixes: B batch, H query heads, h query heads of a rank, K key-value heads, k of a rank, L tokens of a rank before,
M = u L tokens after, C head dim of queries and keys, E of values, X either; W elements that a rank gets for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.collectives import Group
from meshwright.spec.context import kv_copies


def gather_tokens_scatter_heads(
    q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """q_BhMC, k_BkMC, v_BkME. Tokens are in rank order; rank j gets the j-th share of the heads."""
    return _GatherTokensForwardGatherHeadsBackward.apply(q_BHLC, k_BKLC, v_BKLE, group)  # type: ignore[no-any-return]


def gather_heads_scatter_tokens(y_BhME: Tensor, group: Group) -> Tensor:
    """y_BHLE."""
    return _GatherHeadsForwardGatherTokensBackward.apply(y_BhME, group)  # type: ignore[no-any-return]


class _GatherTokensForwardGatherHeadsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, group: Group) -> tuple[Tensor, ...]:
        copies = kv_copies(k_BKLC.shape[1], group.size)
        ctx.group, ctx.copies = group, (1, copies, copies)
        return tuple(_gather_tokens((q_BHLC, k_BKLC, v_BKLE), ctx.copies, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_gather_heads(gradients, ctx.copies, ctx.group), None


class _GatherHeadsForwardGatherTokensBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BhME: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather_heads((y_BhME,), (1,), group)[0]

    @staticmethod
    def backward(ctx: Any, dy_BHLE: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens((dy_BHLE,), (1,), ctx.group)[0], None


def _gather_tokens(tensors: Sequence[Tensor], copies: Sequence[int], group: Group) -> list[Tensor]:
    """Each x_BHLX to x_BhMX, in one all-to-all; every head of tensor i goes to `copies[i]` ranks."""
    u, (B, _, L, _) = group.size, tensors[0].shape
    shares = [(x.shape[1] * c // u, x.shape[3]) for x, c in zip(tensors, copies, strict=True)]
    leaving_uBLW = tensors[0].new_empty(u, B, L, sum(h * width for h, width in shares))
    for x_BHLX, c, view_uBLhX in zip(tensors, copies, _split(leaving_uBLW, shares), strict=True):
        to_rank_BLhX = x_BHLX.unflatten(1, (u // c, -1)).permute(1, 0, 3, 2, 4)
        view_uBLhX.unflatten(0, (u // c, c)).copy_(to_rank_BLhX.unsqueeze(1))
    arrived_uBLW = _all_to_all(leaving_uBLW, group)
    arrived_1BMW = arrived_uBLW.transpose(0, 1).reshape(1, B, u * L, -1)
    return [x_1BMhX[0].transpose(1, 2) for x_1BMhX in _split(arrived_1BMW, shares)]


def _gather_heads(tensors: Sequence[Tensor], copies: Sequence[int], group: Group) -> list[Tensor]:
    """Each x_BhMX to x_BHLX, in one all-to-all; the `copies[i]` versions of a head of tensor i are summed."""
    u, (B, _, M, _) = group.size, tensors[0].shape
    shares = [(x.shape[1], x.shape[3]) for x in tensors]
    parts = [x_BhMX.unflatten(2, (u, M // u)).permute(2, 0, 3, 1, 4) for x_BhMX in tensors]
    if len(parts) == 1:
        leaving_uBLW = parts[0].flatten(3).contiguous()  # of one sequence a kernel's output lies so already
    else:
        leaving_uBLW = tensors[0].new_empty(u, B, M // u, sum(h * width for h, width in shares))
        for view_uBLhX, part_uBLhX in zip(_split(leaving_uBLW, shares), parts, strict=True):
            view_uBLhX.copy_(part_uBLhX)
    arrived_uBLW = _all_to_all(leaving_uBLW, group)
    out = []
    for x_uBLhX, c in zip(_split(arrived_uBLW, shares), copies, strict=True):
        summed = x_uBLhX if c == 1 else x_uBLhX.unflatten(0, (-1, c)).sum(dim=1)
        out.append(summed.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2))
    return out


def _split(x_W: Tensor, shares: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of the last dim's parts, (heads, width) each."""
    parts = x_W.split([heads * width for heads, width in shares], dim=-1)
    return [part.unflatten(-1, share) for part, share in zip(parts, shares, strict=True)]


def _all_to_all(leaving: Tensor, group: Group) -> Tensor:
    """Row i goes to rank i."""
    arriving = torch.empty_like(leaving)
    group.all_to_all(arriving, leaving, [1] * group.size, [1] * group.size)
    return arriving
