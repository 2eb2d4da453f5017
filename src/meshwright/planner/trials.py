"""Layouts asked of the estimator itself, each once: how long a step is, and whether it fits."""

from __future__ import annotations

from bisect import bisect_left

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Price
from meshwright.planner.bounds import Bounds
from meshwright.planner.space import Space
from meshwright.spec.layout import Layout


class Trials:
    """Of the layouts of a space."""

    def __init__(self, space: Space, estimator: Estimator):
        self.space, self.estimator = space, estimator
        self.played: dict[Layout, Price] = {}
        self.fitted: dict[Layout, bool] = {}

    def play(self, layout: Layout) -> Price:
        if layout not in self.played:
            self.played[layout] = self.estimator.played(layout)
        return self.played[layout]

    def fits(self, layout: Layout) -> bool:
        """What `play` says of it, without its time."""
        if layout not in self.fitted:
            self.fitted[layout] = self.played[layout].fits if layout in self.played else self.estimator.fits(layout)
        return self.fitted[layout]

    def that_fits(self, bounds: Bounds, row: int) -> Layout | None:
        """A layout with its relief in the fewest layers with which it fits; None where it does not even in all."""
        if not bounds.relief[row]:
            return layout if self.play(layout := bounds.layout(row)).fits else None
        most = self._most_layers(bounds, row)
        some = [bounds.layout(row, layers) for layers in range(max(1, int(bounds.layers[row])), most + 1)]
        if self.fits(some[0]):  # the bound is seldom wrong
            return some[0]
        return some[bisect_left(some, True, key=self.fits)] if self.fits(some[-1]) else None

    def fits_at_most(self, bounds: Bounds, row: int) -> bool:
        """Whether it fits with its relief in all layers."""
        return self.fits(bounds.layout(row, self._most_layers(bounds, row)))

    def _most_layers(self, bounds: Bounds, row: int) -> int:
        relief = self.space.reliefs[bounds.relief[row]]
        return self.space.most_layers(bounds.pipeline) if relief.recompute != "none" else 1
