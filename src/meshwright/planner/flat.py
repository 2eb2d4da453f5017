"""Bounds of many layouts in one row, to find the quickest of a kind among all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.planner.arrays import Bools, Ints
from meshwright.planner.bounds import Bounds
from meshwright.planner.explain import Kind
from meshwright.planner.space import Space
from meshwright.spec.layout import SCHEDULES, Layout

ROOM = (1.0, 0.98, 0.95, 0.9, 0.8, 0.65)
"""Those layouts are tried until one fits, of each schedule, that by their bounds are the quickest within these shares of the memory."""


@dataclass(frozen=True, slots=True)
class Found:
    """The quickest that fit by their bounds, else what needs the fewest bytes."""

    fitting: tuple[tuple[float, Bounds, int], ...] = ()
    """(seconds, bounds, row), a few of each schedule, quickest first."""
    bytes: float = float("inf")
    least: tuple[Bounds, int] | None = None

    @property
    def seconds(self) -> float:
        return self.fitting[0][0] if self.fitting else float("inf")

    def or_(self, other: Found) -> Found:
        fitting = sorted((*self.fitting, *other.fitting), key=lambda one: one[0])
        least = min(self, other, key=lambda found: found.bytes)
        return Found(tuple(fitting), least.bytes, least.least)


class Flat:
    """Many bounds in one row."""

    def __init__(self, space: Space, every: Sequence[Bounds]):
        self.space, self.every = space, every
        self.seconds, self.bytes = (
            np.concatenate([[], *(getattr(b, name) for b in every)]) for name in ("seconds", "bytes")
        )
        names = ("at", "sharding", "relief", "layers")
        self.at, self.sharding, relief, layers = (
            np.concatenate([np.empty(0, np.int64), *(getattr(b, name) for b in every)]) for name in names
        )
        self.first = np.cumsum([0, *(len(b.at) for b in every)])
        self.number = np.repeat(np.arange(len(every)), np.diff(self.first))
        self.schedule = np.array([SCHEDULES.index(b.pipeline.schedule) for b in every], dtype=np.int64)[self.number]
        self.zero = np.array([sharding.zero for sharding in space.shardings])[self.sharding]
        modes = np.array([relief.recompute for relief in space.reliefs])[relief]
        most = np.array([0, *(space.most_layers(b.pipeline) for b in every)])[1:][self.number]
        self.again = np.where(modes == "none", 0, np.where((modes == "full") & (layers == most), 2, 1))
        """0 where nothing runs again, 2 where all layers do whole, else 1."""

    def where(self, row: int) -> tuple[Bounds, int]:
        """The bounds that have it, and its row there."""
        number = int(self.number[row])
        return self.every[number], int(row - self.first[number])

    def layout(self, row: int) -> Layout:
        bounds, its = self.where(row)
        return bounds.layout(its)

    def taken(self, rows: Bools) -> Iterator[Bounds]:
        """Of each of the bounds those `rows`, if any."""
        for number, bounds in enumerate(self.every):
            its = np.flatnonzero(rows[self.first[number] : self.first[number + 1]])
            if len(its):
                yield bounds.take(its)

    def members(self, kind: Kind, of_kind: Bools, again: Ints | int) -> Bools:
        """Which are of `kind`, if so much of them ran `again`."""
        leaf = [[[kind.leaf(schedule, zero, x) for x in range(3)] for zero in range(4)] for schedule in SCHEDULES]
        return np.asarray(of_kind[self.at] & np.array(leaf)[self.schedule, self.zero, again])

    def least_of(self, kind: Kind, of_kind: Bools, limit: float) -> Found:
        """Of the members of `kind`."""
        its = np.flatnonzero(self.members(kind, of_kind, self.again))
        if not len(its):
            return Found()
        fits = its[self.bytes[its] <= limit]
        if len(fits):
            return Found(tuple((float(self.seconds[row]), *self.where(row)) for row in self._quickest(fits, limit)))
        row = int(its[np.argmin(self.bytes[its])])
        return Found(bytes=float(self.bytes[row]), least=self.where(row))

    def _quickest(self, rows: Ints, limit: float) -> list[int]:
        """Of `rows`, of each schedule the quickest that leave more and more of `limit` free: bounds of memory are not equally near."""
        found = set[int]()
        for schedule in np.flatnonzero(np.bincount(self.schedule[rows])):
            its = rows[self.schedule[rows] == schedule]
            for share in ROOM:
                its = its[self.bytes[its] <= share * limit]
                if len(its):
                    found.add(int(its[np.argmin(self.seconds[its])]))
        return sorted(found, key=lambda row: float(self.seconds[row]))
