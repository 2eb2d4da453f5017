"""Seconds of a matrix product from the tiles that it is cut into.

A kernel computes the output in tiles, one a processor at a time, so that the last wave of tiles may leave processors idle (tile and
wave quantisation: NVIDIA, "Matrix Multiplication Background User's Guide", section 3). The library picks the tile; so does this,
and it may also cut the inner dimension ("split-K") when there are too few tiles, at the price of summing the parts.
"""

from __future__ import annotations

from meshwright.cost.ops import Gemm
from meshwright.spec.kernels import KernelConstants

SUM_BYTES = 8
"""Of each partial sum: fp32, written and read."""


def product_seconds(op: Gemm, rate: float, processors: int, memory_rate: float, constants: KernelConstants) -> float:
    """Of the quickest tiling. `rate`: FLOP/s of a product that fills all `processors`; `memory_rate`: bytes/s."""
    groups, m, n, k = op.groups, op.m - op.largest, op.n, op.k
    alike = min(m, groups - (op.largest > 0))  # with fewer rows than groups, the others have nothing to do
    each = m // alike if alike else 0
    fill, least, best = constants.tile_fill, constants.least_split, float("inf")
    for rows, columns, share in constants.tiles:
        tiles = (alike * -(-each // rows) - (-op.largest // rows)) * -(-n // columns)
        one = 2.0 * rows * columns * processors / (rate * share)
        seconds = -(-tiles // processors) * one * (k + fill)
        if seconds < best:
            best = seconds
        # Into no more parts than keep every processor busy twice.
        cut = 2
        while tiles * cut <= 2 * processors:
            summed = cut * (alike * each + op.largest) * n * SUM_BYTES / memory_rate
            best = min(best, -(-tiles * cut // processors) * one * (max(k / cut, least) + fill) + summed)
            cut *= 2
    return best
