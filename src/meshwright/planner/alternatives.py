"""What people would try first: of each obvious kind the best layout that is found without a search of its own.

Looked at are those that the search has priced, and the likeliest combinations of each kind, as they are and with full recompute.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from meshwright.cost.result import Estimate
from meshwright.planner.arrays import distinct
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.explain import Kind, kinds_of
from meshwright.planner.flat import Flat, Found
from meshwright.planner.space import Relief
from meshwright.planner.trials import Trials
from meshwright.spec.layout import Layout

MOST_PER_KIND = 256
"""Combinations of each kind that are looked at."""
MOST_RECOMPUTED = 128
"""Layouts of each that are looked at with full recompute."""
MOST_TRIES, NEAR = 3, 0.05
"""How many of a kind are played while their steps are longer than their bounds by more than this share."""


class Alternatives:
    """`priced`: bounds that a search has made; `fitting`: (seconds, layout) of those that it found to fit."""

    def __init__(
        self,
        closed: ClosedForm,
        trials: Trials,
        priced: Sequence[Bounds],
        fitting: Collection[tuple[float, Layout]],
    ):
        self.closed, self.trials, self.fitting = closed, trials, fitting
        self.space, self.limit = closed.space, closed.estimator.cluster.accelerator.memory_bytes
        self._priced = [bounds for bounds in priced if bounds.form is closed]

    def beside(self, best: Layout) -> Iterator[tuple[str, Estimate]]:
        """By the names of their kinds: of the quickest that fit by their bounds the first that does when it is tried; where none does, what
        needs least memory. Kinds that the `best` of all is of are left out."""
        seen = {best}
        kinds = [
            (name, kind) for name, kind in kinds_of(self.closed.estimator.cluster.fabric.domain) if not kind.holds(best)
        ]
        for (name, kind), found in zip(kinds, self._best_of([kind for _, kind in kinds]), strict=True):
            layout = self._first_that_fits(found, kind)
            if layout is not None and layout not in seen:
                seen.add(layout)
                yield name, self.closed.estimator.estimate(layout)

    def _first_that_fits(self, found: Found, kind: Kind) -> Layout | None:
        """Or another that is known to be quicker; where its bound was far from its step, the next few are played too."""
        fitting = [one for one in self.fitting if kind.holds(one[1])]
        quickest, tried = min(fitting, key=lambda one: one[0], default=(float("inf"), None)), 0
        for bound, bounds, row in found.fitting:
            if bound >= quickest[0] or tried == MOST_TRIES:
                break
            layout = self.trials.that_fits(bounds, row) if bounds.relief[row] else bounds.layout(row)
            if layout is not None and self.trials.fits(layout):
                layout = self._with_less_relief(bounds, row, kind) or layout
                seconds = self.trials.play(layout).step_time_s
                quickest, tried = min(quickest, (seconds, layout), key=lambda one: one[0]), tried + 1
                if seconds < bound * (1 + NEAR):
                    break
        if quickest[1] is not None:
            return quickest[1]
        if found.fitting:
            return found.fitting[0][1].layout(found.fitting[0][2])
        return found.least[0].layout(found.least[1]) if found.least else None

    def _with_less_relief(self, bounds: Bounds, row: int, kind: Kind) -> Layout | None:
        """If all its layers run again, the same layout with the quickest relief that fits."""
        layout = bounds.layout(row)
        if layout.recompute != "full" or layout.recompute_layers is not None:
            return None
        one = bounds.take(np.array([row]))
        plain = replace(one, relief=np.zeros_like(one.relief), layers=np.zeros_like(one.layers))
        eased = self.closed.relieve(plain, np.array([0]), float(bounds.seconds[row]))
        its = [i for i in np.argsort(eased.seconds, kind="stable").tolist() if kind.holds(eased.layout(i))]
        reliefs = [self.space.reliefs[relief] for relief in eased.relief[its]]
        # Where one that frees more than others is not enough, nor are those, if no more of them is kept on the host.
        part = [relief for relief in reliefs if relief.recompute != "full"]
        most = [one for one in part if not any(_frees_more(other, one) for other in part)]
        short = [one for one in most if not self.trials.fits_at_most(eased, its[reliefs.index(one)])]
        for i, relief in zip(its, reliefs, strict=True):
            if relief in short or any(_frees_more(one, relief) for one in short):
                continue
            if (found := self.trials.that_fits(eased, i)) is not None:
                return found
        return None

    def _best_of(self, kinds: list[Kind]) -> list[Found]:
        """Of each kind, of those already priced and of its likeliest combinations, as they are and with full recompute."""
        columns = [kind.columns(self.space.columns) for kind in kinds]
        likely = [self.closed.likely[np.flatnonzero(of_kind[self.closed.likely])[:MOST_PER_KIND]] for of_kind in columns]
        first = distinct(np.concatenate([np.empty(0, np.int64), *likely])).keys
        flat = Flat(self.space, [*self._priced, *self.closed.price(first, plain=True)])
        every = list(zip(kinds, columns, strict=True))
        found = [flat.least_of(*of, self.limit) for of in every]
        short, wanted = flat.bytes > self.limit, np.zeros(len(flat.at), dtype=bool)
        for one, (kind, of_kind) in zip(found, every, strict=True):
            its = np.flatnonzero(flat.members(kind, of_kind, 2) & (flat.again == 0) & (flat.seconds < one.seconds))
            if one.fitting:
                its = its[short[its]]
            wanted[its[np.argsort(flat.seconds[its], kind="stable")[:MOST_RECOMPUTED]]] = True
        again = Flat(self.space, [self.closed.recomputed(bounds) for bounds in flat.taken(wanted)])
        return [one.or_(again.least_of(*of, self.limit)) for one, of in zip(found, every, strict=True)]


def _frees_more(one: Relief, other: Relief) -> bool:
    """And leaves as much to the host."""
    return one != other and one.offload == other.offload and one.includes(other)
