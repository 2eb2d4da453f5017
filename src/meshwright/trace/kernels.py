"""Stands in for fused attention whose values are narrower than its keys: latent attention, and attention with sinks.

Shape suffixes: B batch, H query heads, K key-value heads, L tokens, C head dim of queries and keys, E of values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.trace.recorder import Recorder
from meshwright.trace.result import Attended


def narrow_attention(recorder: Recorder, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, **options: Any) -> Tensor:
    """Shapes of F.scaled_dot_product_attention, and the tensors that a fused kernel keeps: its inputs, a mask if there is one, the
    output, and a log-sum-exp of each query in fp32."""
    if q_BHLC.shape[3] == v_BKLE.shape[3]:
        return F.scaled_dot_product_attention(q_BHLC, k_BKLC, v_BKLE, **options)
    mask = options["attn_mask"]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=q_BHLC.dtype).masked_fill_(~mask, float("-inf"))
    return _NarrowAttention.apply(q_BHLC, k_BKLC, v_BKLE, mask, recorder)  # type: ignore[no-any-return]


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, mask: Tensor | None, recorder: Recorder
    ) -> Tensor:
        (B, H, L, _), E = q_BHLC.shape, v_BKLE.shape[3]
        y_BHLE = q_BHLC.new_empty(B, L, H, E).transpose(1, 2)
        lse_BHL = q_BHLC.new_empty(B, H, L, dtype=torch.promote_types(q_BHLC.dtype, torch.float32))
        ctx.save_for_backward(q_BHLC, k_BKLC, v_BKLE, mask, y_BHLE, lse_BHL)
        ctx.recorder = recorder
        recorder.add(_attended(recorder, q_BHLC, k_BKLC, v_BKLE, mask, backward=False))
        return y_BHLE

    @staticmethod
    def backward(ctx: Any, grad_BHLE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLC, k_BKLC, v_BKLE, mask, *_ = ctx.saved_tensors
        ctx.recorder.add(_attended(ctx.recorder, q_BHLC, k_BKLC, v_BKLE, mask, backward=True))
        return torch.empty_like(q_BHLC), torch.empty_like(k_BKLC), torch.empty_like(v_BKLE), None, None


def _attended(
    recorder: Recorder, q_BHLC: Tensor, k_BKLC: Tensor, v_BKLE: Tensor, mask: Tensor | None, *, backward: bool
) -> Attended:
    B, H, L, C = q_BHLC.shape
    shown = "causal" if mask is None else "given"
    return Attended(recorder.paths.here, B, H, L, k_BKLC.shape[2], C, v_BKLE.shape[3], backward, k_BKLC.shape[1], shown)
