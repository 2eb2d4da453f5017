"""Attention of a block of queries over a block of keys: what is computed between two hops of a ring.

PyTorch's scaled_dot_product_attention hides the log-sum-exp of the scores, without which blocks cannot be combined, so the fused
kernels are called by their own names; each takes in backward the output and the log-sum-exp of the whole softmax, of which the
block is a part (Dao 2023, arXiv 2307.08691, algorithm 2). Where none serves, the same is written out.

    on the CPU                                      _scaled_dot_product_flash_attention_for_cpu, every dtype and mask
    on CUDA, 16 bits, no mask, heads up to 256 wide _scaled_dot_product_flash_attention
    else                                            plain matmuls, in fp32 or better

Shape suffixes: B batch, H query heads, K key-value heads (H is a multiple), G = H/K, L queries, M keys, C head dim of queries and
keys, E head dim of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
FLASH_WIDTH = 256
"""Widest head that the CUDA flash kernels take."""
FLASH_MULTIPLE = 8
"""Their head dims are multiples of this; zeros are added to others."""


class Shown(NamedTuple):
    """Which keys the queries of a block see: all of them, or a lower triangle of as many queries as keys (`causal`), or those
    at True of `mask` [L, M] or [B, 1, L, M]."""

    causal: bool = False
    mask: Tensor | None = None


def attend(q_BHLC: Tensor, k_BKMC: Tensor, v_BKME: Tensor, shown: Shown, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax over the keys of the block alone: y_BHLE, and the log-sum-exp of its scores lse_BHL in fp32 or better.

    A query that sees no key of the block has y = 0 and lse = -inf.
    """
    if not _fused(q_BHLC, v_BKME, shown):
        return _plain_attend(q_BHLC, k_BKMC, v_BKME, shown, scale)
    out_width = v_BKME.shape[-1]
    q, k, v = _one_width(q_BHLC, k_BKMC, v_BKME)
    if q.device.type == "cuda":
        y_BHLE, lse_BHL = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, shown.causal, scale=scale)[:2]
    else:
        y_BHLE, lse_BHL = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, shown.causal, attn_mask=_additive(shown.mask, q.dtype), scale=scale
        )
        if shown.mask is not None:  # the kernel gives such queries 0 for their log-sum-exp
            lse_BHL.masked_fill_(~shown.mask.any(dim=-1), float("-inf"))
    return y_BHLE[..., :out_width], lse_BHL


class Softmax(NamedTuple):
    """The result of the whole softmax, over all blocks and any sink, and its gradient."""

    y_BHLE: Tensor
    lse_BHL: Tensor
    dy_BHLE: Tensor


def attend_backward(
    q_BHLC: Tensor, k_BKMC: Tensor, v_BKME: Tensor, whole: Softmax, shown: Shown, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients: dq_BHLC, dk_BKMC, dv_BKME."""
    if not _fused(q_BHLC, v_BKME, shown):
        return _plain_backward(q_BHLC, k_BKMC, v_BKME, whole, shown, scale)
    width, out_width = q_BHLC.shape[-1], v_BKME.shape[-1]
    q, k, v, y, dy = _one_width(q_BHLC, k_BKMC, v_BKME, whole.y_BHLE, whole.dy_BHLE)
    if q.device.type == "cuda":
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dy,
            q,
            k,
            v,
            y,
            whole.lse_BHL.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            shown.causal,
            rng,
            rng.new_empty(0),
            scale=scale,
        )
    else:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, whole.lse_BHL, 0.0, shown.causal, attn_mask=_additive(shown.mask, q.dtype), scale=scale
        )
    return dq[..., :width], dk[..., :width], dv[..., :out_width]


def _fused(q_BHLC: Tensor, v_BKME: Tensor, shown: Shown) -> bool:
    if q_BHLC.device.type == "cpu":
        return True
    return (
        q_BHLC.device.type == "cuda"
        and shown.mask is None
        and q_BHLC.dtype in (torch.float16, torch.bfloat16)
        and max(q_BHLC.shape[-1], v_BKME.shape[-1]) <= FLASH_WIDTH
        and torch.cuda.get_device_capability(q_BHLC.device) >= (8, 0)
    )


def _one_width(*tensors: Tensor) -> list[Tensor]:
    """Zeros added to the head dims, which change neither scores nor the values before them."""
    width = max(each.shape[-1] for each in tensors)
    if tensors[0].device.type == "cuda":
        width = -(-width // FLASH_MULTIPLE) * FLASH_MULTIPLE
    return [F.pad(each, (0, width - each.shape[-1])) if each.shape[-1] < width else each for each in tensors]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


# --- written out ------------------------------------------------------------------------------------------------------


def _plain_attend(q_BHLC: Tensor, k_BKMC: Tensor, v_BKME: Tensor, shown: Shown, scale: float) -> tuple[Tensor, Tensor]:
    scores_BKGLM = _scores(q_BHLC, k_BKMC, shown, scale)
    lse_BKGL = scores_BKGLM.logsumexp(dim=-1)
    finite_BKGL1 = lse_BKGL.masked_fill(lse_BKGL == float("-inf"), 0).unsqueeze(-1)
    y_BKGLE = (scores_BKGLM - finite_BKGL1).exp() @ v_BKME.to(lse_BKGL.dtype).unsqueeze(2)
    return y_BKGLE.flatten(1, 2).to(q_BHLC.dtype), lse_BKGL.flatten(1, 2)


def _plain_backward(
    q_BHLC: Tensor, k_BKMC: Tensor, v_BKME: Tensor, whole: Softmax, shown: Shown, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2, algorithm 2, with one block: p = exp(s - lse), ds = p (dp - sum(dy y))."""
    scores_BKGLM = _scores(q_BHLC, k_BKMC, shown, scale)
    exact, kv_heads = scores_BKGLM.dtype, k_BKMC.shape[1]
    q_BKGLC, y_BKGLE, dy_BKGLE = (_grouped(each, kv_heads, exact) for each in (q_BHLC, whole.y_BHLE, whole.dy_BHLE))
    k_BK1MC, v_BK1ME = (each.to(exact).unsqueeze(2) for each in (k_BKMC, v_BKME))
    p_BKGLM = (scores_BKGLM - whole.lse_BHL.unflatten(1, (kv_heads, -1)).unsqueeze(-1)).exp()
    dp_BKGLM = dy_BKGLE @ v_BK1ME.mT
    ds_BKGLM = p_BKGLM * (dp_BKGLM - (dy_BKGLE * y_BKGLE).sum(dim=-1, keepdim=True)) * scale
    dq = (ds_BKGLM @ k_BK1MC).flatten(1, 2)
    dk, dv = (ds_BKGLM.mT @ q_BKGLC).sum(dim=2), (p_BKGLM.mT @ dy_BKGLE).sum(dim=2)
    return dq.to(q_BHLC.dtype), dk.to(k_BKMC.dtype), dv.to(v_BKME.dtype)


def _scores(q_BHLC: Tensor, k_BKMC: Tensor, shown: Shown, scale: float) -> Tensor:
    """s_BKGLM, -inf where a key is not seen."""
    exact = torch.promote_types(q_BHLC.dtype, torch.float32)
    s_BKGLM = _grouped(q_BHLC, k_BKMC.shape[1], exact) @ k_BKMC.to(exact).unsqueeze(2).mT * scale
    mask = shown.mask
    if shown.causal:
        mask = torch.ones(s_BKGLM.shape[-2:], dtype=torch.bool, device=s_BKGLM.device).tril()
    if mask is None:
        return s_BKGLM
    return s_BKGLM.masked_fill_(~(mask if mask.ndim == 2 else mask.unsqueeze(2)), float("-inf"))


def _grouped(x_BHL: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    return x_BHL.to(dtype).unflatten(1, (kv_heads, -1))
