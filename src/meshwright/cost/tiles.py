"""Seconds of a matrix product from the tiles that it is cut into.

A kernel computes the output in tiles, one a processor at a time, so that the last wave of tiles may leave processors idle (tile and
wave quantisation: NVIDIA, "Matrix Multiplication Background User's Guide", section 2.2). The library picks the tile; so does this,
and it may also cut the inner dimension ("split-K") when there are too few tiles, at the price of summing the parts.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.cost.ops import Gemm
from meshwright.spec.kernels import KernelConstants

SUM_BYTES = 8
"""Of each partial sum: fp32, written and read."""


def product_seconds(op: Gemm, rate: float, processors: int, memory_rate: float, constants: KernelConstants) -> float:
    """Of the quickest tiling. `rate`: FLOP/s of a product that fills all `processors`; `memory_rate`: bytes/s."""
    groups = min(op.m, op.groups)  # with fewer rows than groups, the others have nothing to do
    m, n, k = op.m // groups, op.n, op.k
    best = float("inf")
    for rows, columns, share in constants.tiles:
        tiles = groups * -(-m // rows) * -(-n // columns)
        each = 2.0 * rows * columns * processors / (rate * share)
        for cut in _cuts(tiles, processors):
            depth = (max(k / cut, constants.least_split) if cut > 1 else k) + constants.tile_fill
            seconds = -(-tiles * cut // processors) * each * depth
            if cut > 1:
                seconds += cut * groups * m * n * SUM_BYTES / memory_rate
            best = min(best, seconds)
    return best


def _cuts(tiles: int, processors: int) -> Iterator[int]:
    """Into how many parts the inner dimension may be cut: no more than keep every processor busy twice."""
    cut = 1
    while cut == 1 or tiles * cut <= 2 * processors:
        yield cut
        cut *= 2
