"""Search for the best layout: the whole legal space, best first.

Every combination of a space has a bound that costs almost nothing; the best of them get a tighter one for each schedule and
sharding (`bounds.py`); the best of those are priced in full, their schedule played. What is left when no bound is below the best
step found is cut: it cannot hold the optimum. What does not fit as it is gets bounds with each relief when its turn comes; other rank
orders come last, where they could still be quicker.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate
from meshwright.planner.alternatives import Alternatives
from meshwright.planner.arrays import Ints
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.explain import reason_against
from meshwright.planner.flat import Flat
from meshwright.planner.orders import ORDERS, OTHERS
from meshwright.planner.queues import Queue, Short, Unseen
from meshwright.planner.space import Pipeline, Relief, Sharding, Space, legal_space, space_on
from meshwright.planner.trials import Trials
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.legality import check_layout, check_room
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

PLAYED, CLOSE = 32, 5e-3
"""Once so many layouts have been played, one that by its bound could be quicker than the last of those shown by no more than this
share is not played."""
FAR = 3.0
"""Nothing is played first whose bound is above that of combinations still unseen by more than this factor."""
MOST_PLAYED, MOST_TRIED, SMALL_SPACE = 256, 4096, 65_536
"""Layouts played at most, and tried whether they fit, in spaces that have more than so many. What the bounds still leave in doubt is the
answer's `gap`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its price and, unless it is the best, the main reason why it loses."""

    estimate: Estimate
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {**self.estimate.as_dict(), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of a search. `best` is None when nothing fits: then `candidates` has the one that comes nearest."""

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    """The best and the runners-up, quickest first."""
    alternatives: tuple[tuple[str, Candidate], ...]
    """What people would try first, each with the reason why it loses."""
    searched: int
    """Legal layouts, with every relief and in every order of ranks."""
    priced: int
    """Those whose own bound was computed; others were cut with their combination, or need more layers to run again than must."""
    fitting: int
    """Of those priced."""
    played: int
    gap: float
    """How much quicker a layout that was not played could be than the best, by its bound; 0: none can be."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.as_dict() if self.best else None,
            "candidates": [c.as_dict() for c in self.candidates],
            "alternatives": [{"name": name, **c.as_dict()} for name, c in self.alternatives],
            "searched": self.searched,
            "priced": self.priced,
            "fitting": self.fitting,
            "played": self.played,
            "gap": self.gap,
            "seconds": self.seconds,
        }


def plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    gpus: int,
    *,
    top: int = 5,
    precision: Precision = "bf16",
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The quickest layout that fits `gpus` accelerators, its `top - 1` runners-up, and why the obvious others lose. Of layouts that differ
    in recompute, offload and rank order alone, the quickest stands for all.

    `progress` is called with the number of layouts priced so far. Raises UserError when no layout is legal at all.
    """
    with _uncollected():
        return _plan(model, cluster, workload, gpus, top, precision, progress)


def _plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    gpus: int,
    top: int,
    precision: Precision,
    progress: Callable[[int], None] | None,
) -> Plan:
    began = time.perf_counter()
    check_layout(Layout(), model, workload)  # what one rank cannot run, no split can
    check_room(Layout(dp=gpus), cluster)
    space = space_on(cluster, model, workload, gpus, precision)
    if not len(space.local):
        raise _nothing_legal(model, workload, gpus)
    search = _Search(space, Estimator(model, cluster, workload), progress)
    search.run(top)
    leaders = search.leaders(top)
    if not leaders:
        nearest = search.nearest()
        return search.answer(None, (Candidate(nearest, reason_against(nearest, None)),), (), began)
    best = Candidate(leaders[0], "the quickest layout that fits")
    runners_up = [Candidate(e, reason_against(e, best.estimate)) for e in leaders[1:]]
    others = [
        (name, Candidate(e, reason_against(e, best.estimate)))
        for name, e in search.alternatives().beside(best.estimate.layout)
    ]
    return search.answer(best, (best, *runners_up), tuple(others), began)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: a search makes very many small objects and keeps them, and going through them again and
    again takes a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def legal_layouts(space: Space) -> Iterator[Layout]:
    """Every layout of the space, once: for small ones."""
    for at, pipeline, sharding in plain_layouts(space):
        yield from relieved_layouts(space, at, pipeline, sharding)


def plain_layouts(space: Space) -> Iterator[tuple[int, Pipeline, Sharding]]:
    """Of each of them that has no relief the combination, the pipeline and the sharding."""
    for at in range(len(space.local)):
        for pipeline in space.pipelines(int(space.pp[at])):
            if space.runs(pipeline, np.array([at]))[0]:
                for sharding in space.shardings:
                    if space.can_shard(sharding, np.array([at]))[0]:
                        yield at, pipeline, sharding


def relieved_layouts(space: Space, at: int, pipeline: Pipeline, sharding: Sharding) -> Iterator[Layout]:
    """One of them in every order of ranks and with every relief that is legal for it."""
    orders = space.orders(np.array([at]))
    others = [ORDERS[order] for order in OTHERS if orders.can(order)[0]]
    for relief in space.reliefs:
        if space.can_relieve(relief, np.array([at]), np.array([sharding.zero]))[0]:
            most = 1 if relief.recompute == "none" else space.most_layers(pipeline)
            for layers in range(1, most + 1):
                layout = space.layout(at, pipeline, sharding, relief, layers)
                yield layout
                yield from (replace(layout, order=order) for order in others)


class _Search:
    def __init__(self, space: Space, estimator: Estimator, progress: Callable[[int], None] | None):
        self.space, self.estimator, self.progress = space, estimator, progress
        self.closed = ClosedForm(space, estimator)
        self.searched = space.size()
        self.limit = estimator.cluster.accelerator.memory_bytes
        self.trials = Trials(space, estimator)
        self.best: dict[_Key, tuple[float, Layout]] = {}
        self._fitting: dict[tuple[ClosedForm, int, Pipeline, int], list[tuple[Relief, int]]] = {}
        """Of the combinations of a form with a pipeline and a sharding: reliefs, and in how many layers, that are known to be enough."""
        self._whole: dict[ClosedForm, Ints] = {}
        """Of forms in another order of ranks: which combinations of the space theirs are."""
        self.priced = self.fitting = 0
        self.gap = 0.0
        self.bounds: list[Bounds] = []

    def run(self, top: int) -> None:
        """Play layouts in the order of their bounds until none can be quicker than the `top` quickest."""
        unseen, queue, short = Unseen(self.closed.least_seconds, self.closed.likely), Queue(), Short(self.limit)
        ordered = False
        small = self.searched <= SMALL_SPACE
        leaders = [float("inf")] * top
        while True:
            # What is no quicker than the last of the leaders is of no use; after many plays, nor is what is hardly quicker.
            last = leaders[-1]
            enough = last * (1 - CLOSE) if len(self.trials.played) >= PLAYED and not small else last
            next_ = min(queue.least, short.least)
            # The first to be played need not be the first of all: once steps are known, most others need no bound of their own.
            if unseen.least < min(next_, enough) and (last < float("inf") or next_ > FAR * unseen.least):
                found = self._block(self.closed, unseen.pop(last), last)
            elif self._is_spent(small) or (next_ >= enough and (ordered or not self.best)):
                orders = float("inf") if ordered else float(self.closed.least_in_any_order.min())
                self.gap = max(0.0, 1 - min(next_, unseen.least, orders) / leaders[0]) if self.best else 0.0
                return
            elif next_ >= enough:
                found, ordered = self._in_other_orders(last), True
            elif short.least < queue.least:
                found = [self._relieved(*short.pop(last), last)]
            else:
                found = self._look(*queue.pop(), last)
                steps = sorted(seconds for seconds, _ in self.best.values())
                leaders = [*steps[:top], *leaders[len(steps) :]]
            queue.add([(bounds, rows[bounds.bytes[rows] <= self.limit]) for bounds, rows in found])
            short.add(found)

    def _is_spent(self, small: bool) -> bool:
        return not small and (len(self.trials.played) >= MOST_PLAYED or len(self.trials.fitted) >= MOST_TRIED)

    def _look(self, bounds: Bounds, row: int, enough: float) -> list[tuple[Bounds, Ints]]:
        """Play what has the least bound, if it fits; if it needs relief for that, what is to be looked at instead."""
        key, relief = self._key(bounds, row), self.space.reliefs[bounds.relief[row]]
        if key in self.best and bounds.seconds[row] >= self.best[key][0]:
            return []  # with another relief it is quicker
        fitting = self._fitting.setdefault((bounds.form, int(bounds.at[row]), *key[1:]), [])
        if any(layers <= bounds.layers[row] and relief.includes(less) for less, layers in fitting):
            return []  # less of a relief is enough
        layout = self.trials.that_fits(bounds, row)
        if layout is None:
            return [] if bounds.relief[row] else [self._relieved(bounds, np.array([row]), enough)]
        most = 0 if relief.recompute == "none" else self.space.most_layers(bounds.pipeline)
        fitting.append((relief, layout.recompute_layers or most))
        seconds = self.trials.play(layout).step_time_s
        if key not in self.best or seconds < self.best[key][0]:
            self.best[key] = seconds, layout
        return []

    def _key(self, bounds: Bounds, row: int) -> _Key:
        at = int(bounds.at[row])
        return (
            int(self._whole[bounds.form][at]) if bounds.form in self._whole else at,
            bounds.pipeline,
            int(bounds.sharding[row]),
        )

    def _in_other_orders(self, best: float) -> list[tuple[Bounds, Ints]]:
        """What of all combinations may be quicker than `best` with its ranks in another order than the usual."""
        quick = np.flatnonzero(self.closed.least_in_any_order < best)
        which, order = self.space.orders(quick).others()
        at = quick[which]
        if not len(at):
            return []
        form = self.closed.ordered(at, order)
        self._whole[form] = at
        return self._block(form, np.flatnonzero(form.least_seconds < best), best)

    def leaders(self, top: int) -> list[Estimate]:
        """The quickest that fit, no two of which differ in relief and rank order alone, priced with all their tables."""
        fitting = sorted((seconds, str(layout), layout) for seconds, layout in self.best.values())
        return [self.estimator.estimate(layout) for _, _, layout in fitting[:top]]

    def nearest(self) -> Estimate:
        """What needs least memory, where nothing fits."""
        plain = list(self.closed.price(np.arange(len(self.space.local))))
        every = Flat(self.space, [*plain, *map(self.closed.emptied, plain)])
        best, least = None, float("inf")
        for number, row in enumerate(np.argsort(every.bytes, kind="stable").tolist()):
            if every.bytes[row] >= least or (best is not None and number >= MOST_PLAYED):
                break
            layout = every.layout(row)
            if self.estimator.host_holds(layout) and (peak := self.estimator.played(layout).peak_bytes) < least:
                best, least = layout, peak
        assert best is not None
        return self.estimator.estimate(best)

    def alternatives(self) -> Alternatives:
        return Alternatives(self.closed, self.trials, self.bounds, self.best.values())

    def answer(
        self,
        best: Candidate | None,
        candidates: tuple[Candidate, ...],
        alternatives: tuple[tuple[str, Candidate], ...],
        began: float,
    ) -> Plan:
        counts = (self.searched, self.priced, self.fitting, len(self.trials.played))
        return Plan(best, candidates, alternatives, *counts, self.gap, time.perf_counter() - began)

    def _block(self, form: ClosedForm, at: Ints, best: float) -> list[tuple[Bounds, Ints]]:
        """What of the combinations `at` of `form` may be quicker than `best`, whether it fits or not."""
        found = []
        for bounds in form.price(np.sort(at), below=best):
            self.bounds.append(bounds)
            self._count(len(bounds.at), int((bounds.bytes <= self.limit).sum()))
            found.append((bounds, np.flatnonzero(bounds.seconds < best)))
        return found

    def _relieved(self, bounds: Bounds, rows: Ints, best: float) -> tuple[Bounds, Ints]:
        """What of `rows`, which do not fit as they are, may do so with some relief, and be quicker than `best`."""
        found = bounds.form.relieve(bounds, rows, best)
        self.bounds.append(found)
        self._count(len(found.at), len(found.at))
        return found, np.arange(len(found.at))

    def _count(self, priced: int, fitting: int) -> None:
        self.priced, self.fitting = self.priced + priced, self.fitting + fitting
        if self.progress:
            self.progress(self.priced)


_Key = tuple[int, Pipeline, int]
"""What layouts have in common that differ in relief and rank order alone: combination, pipeline, sharding."""


def _nothing_legal(model: Model, workload: Workload, gpus: int) -> UserError:
    legal = (n for n in range(gpus - 1, 0, -1) if len(legal_space(model, workload, n, "bf16").local))
    near = list(islice(legal, 2))
    return UserError(
        f"no layout of {gpus} ranks divides {model.name} ({model.layers} layers, {model.heads} heads) and a global batch of "
        f"{workload.global_batch}: dp must divide the batch; try {' or '.join(map(str, near))} ranks or another batch"
    )
