"""What a search looks at next: candidates in the order of their bounds."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from meshwright.planner.arrays import Floats, Ints
from meshwright.planner.bounds import Bounds

FIRST_BLOCK, GROWTH = 512, 8
"""Combinations that get their tighter bounds at once; and of each further block."""
SOON = 1.05
"""With a layout that does not fit, the reliefs of those are priced whose bounds are above its own by no more than this factor."""


class Unseen:
    """Combinations whose layouts have no bounds yet: the likeliest come first, then the others by their bounds, `seconds`."""

    def __init__(self, seconds: Floats, likely: Ints):
        self._seconds, self._first = seconds, likely[:FIRST_BLOCK]
        self._is_other = np.ones(len(seconds), dtype=bool)
        self._is_other[self._first] = False
        self._others: Ints | None = None
        self._block = 0

    @cached_property
    def _least_other(self) -> float:
        return float(self._seconds[self._is_other].min(initial=np.inf))

    @property
    def least(self) -> float:
        if not self._block:
            return 0.0
        if self._others is None:
            return self._least_other
        return float(self._seconds[self._others[0]]) if len(self._others) else float("inf")

    def pop(self, enough: float) -> Ints:
        """The next block of those that are below `enough` seconds, which never grows."""
        self._block = GROWTH * self._block or FIRST_BLOCK
        if self._block == FIRST_BLOCK:
            return self._first
        if self._others is None:
            rest = np.flatnonzero(self._is_other & (self._seconds < enough))
            self._others = rest[np.argsort(self._seconds[rest], kind="stable")]
        block, self._others = self._others[: self._block], self._others[self._block :]
        return block[self._seconds[block] < enough]


class Queue:
    """Candidates by their bounds; each block of them is sorted once."""

    def __init__(self) -> None:
        self._blocks: list[tuple[list[Bounds], Floats, Ints, Ints]] = []
        self._heads: list[tuple[float, int, int]] = []

    @property
    def least(self) -> float:
        return self._heads[0][0] if self._heads else float("inf")

    def add(self, found: Sequence[tuple[Bounds, Ints]]) -> None:
        """Those rows of each of the bounds."""
        seconds = np.concatenate([np.empty(0), *(bounds.seconds[rows] for bounds, rows in found)])
        numbers = np.repeat(np.arange(len(found)), [len(rows) for _, rows in found])
        order, every = (
            np.argsort(seconds, kind="stable"),
            np.concatenate([np.empty(0, np.int64), *(rows for _, rows in found)]),
        )
        self._blocks.append(([bounds for bounds, _ in found], seconds[order], numbers[order], every[order]))
        self._push(len(self._blocks) - 1, 0)

    def pop(self) -> tuple[Bounds, int]:
        """The bounds that have the least, and its row there."""
        _, block, at = heapq.heappop(self._heads)
        self._push(block, at + 1)
        every, _, numbers, rows = self._blocks[block]
        return every[numbers[at]], int(rows[at])

    def _push(self, block: int, at: int) -> None:
        seconds = self._blocks[block][1]
        if at < len(seconds):
            heapq.heappush(self._heads, (float(seconds[at]), block, at))


class Short:
    """Those of the candidates that do not fit as they are, by their bounds; of each of the `Bounds` the next few together."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._every: list[tuple[Bounds, Ints]] = []
        self._heads: list[tuple[float, int, int]] = []

    @property
    def least(self) -> float:
        return self._heads[0][0] if self._heads else float("inf")

    def add(self, found: Sequence[tuple[Bounds, Ints]]) -> None:
        """Those rows of each of the bounds that need relief and have none."""
        for bounds, rows in found:
            its = rows[(bounds.bytes[rows] > self._limit) & (bounds.relief[rows] == 0)]
            self._every.append((bounds, its[np.argsort(bounds.seconds[its], kind="stable")]))
            self._push(len(self._every) - 1, 0)

    def pop(self, enough: float) -> tuple[Bounds, Ints]:
        """The bounds that have the least, and its row there with those that are below `enough`, or, if nothing is known to be, that come
        soon after it."""
        least, number, at = heapq.heappop(self._heads)
        bounds, rows = self._every[number]
        near = enough if enough < float("inf") else SOON * least
        end = at + max(1, int(np.searchsorted(bounds.seconds[rows[at:]], near)))
        self._push(number, end)
        return bounds, rows[at:end]

    def _push(self, number: int, at: int) -> None:
        bounds, rows = self._every[number]
        if at < len(rows):
            heapq.heappush(self._heads, (float(bounds.seconds[rows[at]]), number, at))
