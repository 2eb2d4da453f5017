"""Search for the best layout: the whole legal space, best first.

Every combination of a space has a bound that costs almost nothing; the best of them get a tighter one for each schedule and
sharding (`bounds.py`); the best of those are priced in full, their schedule played. What is left when no bound is below the best
step found is cut: it cannot hold the optimum.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate, Price
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.explain import Kind, kinds_of, reason_against
from meshwright.planner.space import Bools, Floats, Ints, Space, legal_space
from meshwright.planner.tables import make_tables
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.legality import check_layout, check_room
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

FIRST_BLOCK = 1024
"""Combinations that get their tighter bounds at once."""
GROWTH = 4
"""Of each further block."""
PLAYED, CLOSE = 48, 5e-3
"""Once so many layouts have been played, one that by its bound could be quicker than the last of those shown by no more than this
share is not played."""
FAR = 1.5
"""Nothing is played first whose bound is above that of combinations still unseen by more than this factor."""
MOST_PLAYED, SMALL_SPACE = 256, 4096
"""Layouts played at most, in spaces that have more than so many. What the bounds still leave in doubt is the answer's `gap`."""
TRIED = 12
"""Layouts of an obvious kind that are looked at until one fits, as many of each schedule."""
MOST_PER_KIND = 4096
"""Combinations of each obvious kind that are looked at."""


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
    """Legal layouts."""
    priced: int
    """Those whose own bound was computed; the others' combinations were cut before."""
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
    """The quickest layout that fits `gpus` accelerators, its `top - 1` runners-up, and why the obvious others lose.

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
    space = legal_space(model, workload, gpus, precision, cluster.fabric.domain)
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
        (name, Candidate(e, reason_against(e, best.estimate))) for name, e in search.alternatives(best.estimate.layout)
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
    for at in range(len(space.local)):
        for pipeline in space.pipelines(int(space.pp[at])):
            if space.runs(pipeline, np.array([at]))[0]:
                for sharding in space.shardings:
                    if space.can_shard(sharding, np.array([at]))[0]:
                        yield space.layout(at, pipeline, sharding)


class _Search:
    def __init__(self, space: Space, estimator: Estimator, progress: Callable[[int], None] | None):
        self.space, self.estimator, self.progress = space, estimator, progress
        self.closed = ClosedForm(space, estimator, make_tables(space, estimator))
        self.limit = estimator.cluster.accelerator.memory_bytes
        self.played: dict[Layout, Price] = {}
        self.fit: dict[Layout, bool] = {}
        self.priced = self.fitting = 0
        self.gap = 0.0
        self.bounds: list[Bounds] = []

    @cached_property
    def _order(self) -> Ints:
        """The combinations, the most promising first."""
        return np.argsort(self.closed.least_seconds, kind="stable")

    def run(self, top: int) -> None:
        """Play layouts in the order of their bounds until none can be quicker than the `top` quickest."""
        least, order = self.closed.least_seconds, self._order
        queue = _Queue()
        start, block = 0, FIRST_BLOCK
        small = self.space.size() <= SMALL_SPACE
        most = SMALL_SPACE if small else MOST_PLAYED
        leaders = [float("inf")] * top
        while True:
            # What is no quicker than the last of the leaders is of no use; after many plays, nor is what is hardly quicker.
            many = len(self.played) >= PLAYED and not small
            enough = leaders[-1] * (1 - CLOSE) if many else leaders[-1]
            unseen = float(least[order[start]]) if start < len(order) else float("inf")
            # The first to be played need not be the first of all: once steps are known, most others need no bound of their own.
            known = leaders[-1] < float("inf") or queue.least > FAR * unseen
            if unseen < min(queue.least, enough) and known:
                queue.add(*self._block(order[start : start + block], enough))
                start, block = start + block, GROWTH * block
                continue
            if queue.least >= enough or len(self.played) >= most:
                best = leaders[0]
                self.gap = max(0.0, 1 - min(queue.least, unseen) / best) if best < float("inf") else 0.0
                return
            number, index = queue.pop()
            quick = self._play(self._layout(self.bounds[number], index))
            if quick.fits:
                leaders = sorted((*leaders, quick.step_time_s))[:top]

    def leaders(self, top: int) -> list[Estimate]:
        """The quickest that fit, priced with all their tables."""
        fitting = sorted((quick.step_time_s, str(layout), layout) for layout, quick in self.played.items() if quick.fits)
        return [self.estimator.estimate(layout) for _, _, layout in fitting[:top]]

    def nearest(self) -> Estimate:
        """What needs least memory, where nothing fits."""
        every = _Flat(self.space, list(self.closed.price(np.arange(len(self.space.local)))))
        best, least = None, float("inf")
        for row in np.argsort(every.bytes, kind="stable")[:MOST_PLAYED].tolist():
            if every.bytes[row] >= least:
                break
            layout = every.layout(row)
            peak = self.estimator.played(layout).peak_bytes
            if peak < least:
                best, least = layout, peak
        assert best is not None
        return self.estimator.estimate(best)

    def alternatives(self, best: Layout) -> Iterator[tuple[str, Estimate]]:
        """The best of each obvious kind (of the quickest that fit by their bounds the first that does when it is played; else what
        needs least memory), unless the best of all is of that kind itself."""
        seen = {best}
        kinds = [(name, kind) for name, kind in kinds_of(self.estimator.cluster.fabric.domain) if not kind.holds(best)]
        for (name, _), found in zip(kinds, self._best_of([kind for _, kind in kinds]), strict=True):
            layout = self._first_that_fits(found)
            if layout is not None and layout not in seen:
                seen.add(layout)
                yield name, self.estimator.estimate(layout)

    def _first_that_fits(self, found: _Found) -> Layout | None:
        for _, layout in found.fitting:
            if layout not in self.fit:
                self.fit[layout] = self.played[layout].fits if layout in self.played else self.estimator.fits(layout)
            if self.fit[layout]:
                return layout
        return found.fitting[0][1] if found.fitting else found.least

    def _best_of(self, kinds: list[Kind]) -> list[_Found]:
        """First of those already priced and of the most promising of each kind; then of all that may still be quicker."""
        least, limit = self.closed.least_seconds, self.limit
        of_kinds = [kind.columns(self.space.columns) for kind in kinds]
        orders = [self._order[np.flatnonzero(of_kind[self._order])[:MOST_PER_KIND]] for of_kind in of_kinds]
        first = np.unique(np.concatenate([[], *(order[:FIRST_BLOCK] for order in orders)]).astype(np.int64))
        flat = _Flat(self.space, [*self.bounds, *self.closed.price(first, plain=True)])
        found = [flat.least_of(kind, of_kind, limit) for kind, of_kind in zip(kinds, of_kinds, strict=True)]
        below = np.zeros(len(least))
        for one, order in zip(found, orders, strict=True):
            quicker = order[least[order] < one.seconds]
            below[quicker] = np.maximum(below[quicker], one.seconds)
        below[first] = 0.0
        rest = np.flatnonzero(below)
        flat = _Flat(self.space, list(self.closed.price(rest, below=below[rest], plain=True)))
        return [
            one.or_(flat.least_of(kind, of_kind, limit)) for one, kind, of_kind in zip(found, kinds, of_kinds, strict=True)
        ]

    def answer(
        self,
        best: Candidate | None,
        candidates: tuple[Candidate, ...],
        alternatives: tuple[tuple[str, Candidate], ...],
        began: float,
    ) -> Plan:
        counts = (self.space.size(), self.priced, self.fitting, len(self.played))
        return Plan(best, candidates, alternatives, *counts, self.gap, time.perf_counter() - began)

    def _block(self, at: Ints, best: float) -> tuple[Floats, Ints, Ints]:
        """What of the combinations `at` fits and may be quicker than `best`: its bound, the number of its `Bounds`, its index there."""
        seconds, numbers, indices = [np.empty(0)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for bounds in self.closed.price(np.sort(at), below=best):
            fits = bounds.bytes <= self.limit
            self.priced += len(fits)
            self.fitting += int(fits.sum())
            its = np.flatnonzero(fits & (bounds.seconds < best))
            seconds.append(bounds.seconds[its])
            numbers.append(np.full(len(its), len(self.bounds)))
            indices.append(its)
            self.bounds.append(bounds)
            if self.progress:
                self.progress(self.priced)
        return np.concatenate(seconds), np.concatenate(numbers), np.concatenate(indices)

    def _play(self, layout: Layout) -> Price:
        if layout not in self.played:
            self.played[layout] = self.estimator.played(layout)
        return self.played[layout]

    def _layout(self, bounds: Bounds, index: int) -> Layout:
        return _layout(self.space, bounds, index)


def _layout(space: Space, bounds: Bounds, index: int) -> Layout:
    return space.layout(int(bounds.at[index]), bounds.pipeline, space.shardings[bounds.sharding[index]])


@dataclass(frozen=True, slots=True)
class _Found:
    """The quickest that fit by their bounds, else what needs the fewest bytes."""

    fitting: tuple[tuple[float, Layout], ...] = ()
    """With their seconds, a few of each schedule, quickest first."""
    bytes: float = float("inf")
    least: Layout | None = None

    @property
    def seconds(self) -> float:
        return self.fitting[0][0] if self.fitting else float("inf")

    def or_(self, other: _Found) -> _Found:
        fitting = sorted((*self.fitting, *other.fitting), key=lambda one: one[0])
        least = min(self, other, key=lambda found: found.bytes)
        return _Found(tuple(fitting), least.bytes, least.least)


class _Flat:
    """Many bounds in one row."""

    def __init__(self, space: Space, every: Sequence[Bounds]):
        self.space, self.every = space, every
        self.seconds, self.bytes = (
            np.concatenate([[], *(getattr(b, name) for b in every)]) for name in ("seconds", "bytes")
        )
        self.at, self.sharding = (
            np.concatenate([np.empty(0, np.int64), *(getattr(b, name) for b in every)]) for name in ("at", "sharding")
        )
        self.first = np.cumsum([0, *(len(b.at) for b in every)])
        self.number = np.repeat(np.arange(len(every)), np.diff(self.first))

    def layout(self, row: int) -> Layout:
        number = self.number[row]
        return _layout(self.space, self.every[number], int(row - self.first[number]))

    def least_of(self, kind: Kind, of_kind: Bools, limit: float) -> _Found:
        """Of the members of `kind`."""
        zeros = [sharding.zero for sharding in self.space.shardings]
        leaf = [[kind.leaf(b.pipeline.schedule, zero) for zero in zeros] for b in self.every]
        its = np.flatnonzero(of_kind[self.at])
        its = its[np.array(leaf, dtype=bool).reshape(-1, len(zeros))[self.number[its], self.sharding[its]]]
        if not len(its):
            return _Found()
        fits = its[self.bytes[its] <= limit]
        if len(fits):
            return _Found(tuple((float(self.seconds[row]), self.layout(row)) for row in self._quickest(fits)))
        row = int(its[np.argmin(self.bytes[its])])
        return _Found(bytes=float(self.bytes[row]), least=self.layout(row))

    def _quickest(self, rows: Ints) -> list[int]:
        """Of `rows`, a few of each schedule: their bounds of memory are not equally near."""
        schedules = np.array([b.pipeline.schedule for b in self.every])[self.number[rows]]
        found, names = list[int](), np.unique(schedules)
        for schedule in names:
            its = rows[schedules == schedule]
            few = min(TRIED // len(names), len(its))
            found += its[np.argpartition(self.seconds[its], few - 1)[:few]].tolist()
        return sorted(found, key=lambda row: float(self.seconds[row]))


class _Queue:
    """Candidates by their bounds; each block of them is sorted once."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Floats, Ints, Ints]] = []
        self._heads: list[tuple[float, int, int]] = []

    @property
    def least(self) -> float:
        return self._heads[0][0] if self._heads else float("inf")

    def add(self, seconds: Floats, numbers: Ints, indices: Ints) -> None:
        order = np.argsort(seconds, kind="stable")
        self._blocks.append((seconds[order], numbers[order], indices[order]))
        self._push(len(self._blocks) - 1, 0)

    def pop(self) -> tuple[int, int]:
        """(number, index) of the least."""
        _, block, at = heapq.heappop(self._heads)
        self._push(block, at + 1)
        _, numbers, indices = self._blocks[block]
        return int(numbers[at]), int(indices[at])

    def _push(self, block: int, at: int) -> None:
        seconds = self._blocks[block][0]
        if at < len(seconds):
            heapq.heappush(self._heads, (float(seconds[at]), block, at))


def _nothing_legal(model: Model, workload: Workload, gpus: int) -> UserError:
    legal = (n for n in range(gpus - 1, 0, -1) if len(legal_space(model, workload, n, "bf16").local))
    near = list(islice(legal, 2))
    return UserError(
        f"no layout of {gpus} ranks divides {model.name} ({model.layers} layers, {model.heads} heads) and a global batch of "
        f"{workload.global_batch}: dp must divide the batch; try {' or '.join(map(str, near))} ranks or another batch"
    )
