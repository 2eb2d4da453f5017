"""How fast ranks compute: matrix products, causal attention, and work bound by memory. These functions run on the ranks.

Every rank of the process group measures at once, so its size is the points' activity. All ranks return the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshwright.cost.ops import Attention
from meshwright.probe.window import call_rate, rank_device, rounded
from meshwright.spec.cluster import AttentionPoint, MatmulPoint

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIM = 64


def measure_matmul(precision: str, shapes: Sequence[tuple[int, int, int]], seconds: float) -> tuple[MatmulPoint, ...]:
    """FLOP/s of a linear at each (m tokens, n, k), `seconds` a shape. Operands that fit stay in cache, as in a step."""
    device, dtype, active = rank_device(), DTYPES[precision], dist.get_world_size()
    points = []
    for m, n, k in shapes:
        x = torch.randn(m, k, device=device, dtype=dtype)
        weight = torch.randn(n, k, device=device, dtype=dtype)
        rate = call_rate(partial(F.linear, x, weight), seconds)
        points.append(
            MatmulPoint(precision=precision, m=m, n=n, k=k, active=active, flops_per_s=rounded(2.0 * m * n * k * rate))
        )
    return tuple(points)


def measure_attention(precision: str, lengths: Sequence[int], heads: int, seconds: float) -> tuple[AttentionPoint, ...]:
    """FLOP/s of causal attention, forward and backward, over one sequence of each length; `seconds` a length.

    FLOPs are those under the mask, as in `cost.program.Attention`. q, k, v lie in memory as the model's linears write them.
    """
    device, dtype = rank_device(), DTYPES[precision]
    points = []
    for length in lengths:
        shape = (1, length, heads, HEAD_DIM)
        q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
        rates = _attention_rates((q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), grad, seconds / 2)
        points.append(_attention_point(precision, length, heads, *rates))
    return tuple(points)


def _attention_rates(qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, seconds: float) -> tuple[float, float]:
    """Calls per second forward and backward, `seconds` a direction."""
    y = F.scaled_dot_product_attention(*qkv, is_causal=True)
    forwards = call_rate(lambda: F.scaled_dot_product_attention(*qkv, is_causal=True), seconds)
    return forwards, call_rate(lambda: torch.autograd.grad(y, qkv, grad, retain_graph=True), seconds)


def _attention_point(precision: str, length: int, heads: int, forwards: float, backwards: float) -> AttentionPoint:
    """From calls per second in each direction."""
    flops = {b: Attention("", 1, heads, length, HEAD_DIM, HEAD_DIM, window=None, backward=b).flops for b in (False, True)}
    return AttentionPoint(
        precision=precision,
        flops=flops[False],
        active=dist.get_world_size(),
        forward_flops_per_s=rounded(flops[False] * forwards),
        backward_flops_per_s=rounded(flops[True] * backwards),
    )


def measure_memory(nbytes: int, seconds: float) -> float:
    """Bytes/s, read and written, of the elementwise work of four layers on fp32 arrays of `nbytes`: residual, norm, SwiGLU.

    The results are kept until the end, as a step keeps activations for backward: on a CPU, writing to memory that is new
    each time takes several times as long as a copy between two arrays that are reused, and steps see the former.
    """
    device, hidden = rank_device(), 1024
    x, y = (torch.randn(nbytes // 4 // hidden, hidden, device=device) for _ in range(2))
    weight = torch.ones(hidden, device=device)

    def layer() -> tuple[Tensor, ...]:
        opened = F.silu(x)  # 2 arrays read or written
        return x + y, F.rms_norm(x, (hidden,), weight), opened, opened * y  # 3 + 2 + 3

    return rounded(4 * 10 * x.nbytes * call_rate(lambda: [layer() for _ in range(4)], seconds))
