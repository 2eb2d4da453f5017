"""Seconds of a matrix product from the tiles that it is cut into.

A kernel computes the output in tiles, one a processor at a time, so that the last wave of tiles may leave processors idle (tile and
wave quantisation: NVIDIA, "Matrix Multiplication Background User's Guide", section 2.2). The library picks the tile; so does this,
and it may also cut the inner dimension ("split-K") when there are too few tiles, at the price of summing the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from meshwright.cost.ops import Gemm
from meshwright.spec.kernels import KernelConstants

SUM_BYTES = 8
"""Of each partial sum: fp32, written and read."""


def product_seconds(op: Gemm, rate: float, processors: int, memory_rate: float, constants: KernelConstants) -> float:
    """Of the quickest tiling. `rate`: FLOP/s of a product that fills all `processors`; `memory_rate`: bytes/s."""
    shape = op.m // op.groups, op.n, op.k, op.groups
    return _quickest(
        shape, rate / processors, processors, memory_rate, constants.tiles, constants.tile_fill, constants.least_split
    )


@lru_cache(maxsize=65536)
def _quickest(
    shape: tuple[int, int, int, int],
    each: float,
    processors: int,
    memory_rate: float,
    kinds: tuple[tuple[int, int, float], ...],
    fill: float,
    least: int,
) -> float:
    """`shape`: rows of a group, columns, inner elements, groups; `each`: FLOP/s of a processor. Layers repeat their products."""
    m, n, k, groups = shape
    best = float("inf")
    for rows, columns, share in kinds:
        tiles = groups * -(-m // rows) * -(-n // columns)
        for cut in _cuts(tiles, processors):
            waves = -(-tiles * cut // processors)
            depth = (max(k / cut, least) if cut > 1 else k) + fill
            seconds = waves * 2.0 * rows * columns * depth / (each * share)
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
