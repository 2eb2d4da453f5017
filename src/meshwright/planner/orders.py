"""Rank orders of many layouts at once: which have a price, and which change any."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

import numpy as np

from meshwright.planner.arrays import Bools, Ints
from meshwright.spec.layout import DENSE_AXES

Order = tuple[str, ...]

ORDERS: tuple[Order, ...] = tuple(permutations(DENSE_AXES))
"""Innermost axis first; the usual order is the first."""
OTHERS = range(1, len(ORDERS))
Degrees = dict[str, Ints]
"""By axis."""


@dataclass(frozen=True)
class RankOrders:
    """Of layouts with these `degrees`; `experts`: whether they cut experts; `domain`: ranks of a scale-up domain. An order is given by its
    number in `ORDERS`."""

    degrees: Degrees
    experts: Bools
    domain: int

    def can(self, order: int) -> Bools:
        """Which can have their ranks in this order, not the usual one: axes of degree 1 come last, the others are not in the usual order,
        and the cost model knows its price (`rules/reshape.order_has_price`)."""
        axes, apart = ORDERS[order], self._strides(order)
        split = [self.degrees[axis] > 1 for axis in axes]
        moved, legal = np.zeros_like(self.experts), np.ones_like(self.experts)
        for i, j in combinations(range(len(axes)), 2):
            legal &= split[i] | ~split[j]
            if DENSE_AXES.index(axes[i]) > DENSE_AXES.index(axes[j]):
                moved |= split[i] & split[j]
                legal &= split[i] | split[j]
        for axis in ("tp", "cp", "pp"):  # all neighbours on it share a domain, or none do
            alike = (apart[axis] * self.degrees[axis] <= self.domain) | (apart[axis] % self.domain == 0)
            legal &= alike | (self.degrees[axis] == 1)
        dp, cp, pp = (axes.index(axis) for axis in ("dp", "cp", "pp"))
        for between in range(min(dp, cp) + 1, max(dp, cp)):
            legal &= ~(split[dp] & split[cp] & split[between])
        for after in range(pp + 1, len(axes)):
            legal &= ~(self.experts & split[pp] & split[after])
        return legal & moved

    def links(self, order: int) -> Ints:
        """A number that tells orders apart which differ in how many ranks of a group share a domain; where it is the same, so are all
        prices."""
        apart, out = self._strides(order), np.zeros(len(self.experts), dtype=np.int64)
        groups = [(self.degrees[axis], apart[axis]) for axis in DENSE_AXES]
        data = self.degrees["dp"] * self.degrees["cp"], data_stride(apart, self.degrees)
        for size, stride in (*groups, data):
            out = out * (self.domain + 1) + np.clip(self.domain // stride, 1, np.clip(size, 1, self.domain))
        return out

    def others(self) -> tuple[Ints, Ints]:
        """Each layout with every other order that may change its price: (which layout, which order)."""
        known, found = [self.links(0)], []
        for order in OTHERS:
            links = self.links(order)
            new = self.can(order) & np.all([links != before for before in known], axis=0)
            known.append(np.where(new, links, -1))
            found.append(np.flatnonzero(new))
        return np.concatenate(found), np.repeat(np.array(OTHERS), [len(its) for its in found])

    def _strides(self, order: int) -> Degrees:
        return strides(np.full(len(self.experts), order), self.degrees)


def strides(order: Ints, degrees: Degrees) -> Degrees:
    """Ranks between neighbours on each axis: the product of the degrees of those that come before it in its `order`."""
    out, counts = {axis: np.ones_like(order) for axis in DENSE_AXES}, np.bincount(order)
    for number in np.flatnonzero(counts).tolist():
        its = slice(None) if counts[number] == len(order) else np.flatnonzero(order == number)
        for before, axis in pairwise(ORDERS[number]):
            out[axis][its] = out[before][its] * degrees[before][its]
    return out


def data_stride(apart: Degrees, degrees: Degrees) -> Ints:
    """Between ranks that hold the same weights of attention and dense layers, neighbours on dp and cp together; `apart`: strides."""
    spans = [np.where(degrees[x] > 1, apart[x] * degrees[x], 0) for x in ("dp", "cp")]
    ranks = degrees["dp"] * degrees["cp"]
    return np.asarray(np.where(ranks > 1, np.maximum(*spans), ranks) // ranks)
