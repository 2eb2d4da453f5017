"""Which stages of a pipeline hold what, and what each kind of stage does and keeps, for many combinations at once."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np

from meshwright.planner.arrays import Floats, Ints, taken
from meshwright.planner.flights import by_chunks, deferred, held, in_flight
from meshwright.planner.space import Pipeline
from meshwright.planner.state import Held
from meshwright.planner.tables import Kind
from meshwright.schedule.stages import placement, stage_chunks
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model

SPLIT_BACKWARD = ("zb-h1", "zb-v", "dualpipe-v")
EMBEDDING, HEAD = -2, -1
"""Their rows in the tables."""


class Work(NamedTuple):
    """Of some combinations: rows of the tables, [kinds + 2, combinations]."""

    forward: Floats
    backward: Floats
    weight: Floats
    saved: Floats
    put_off: Floats
    working: Floats
    forward_scale_up: Floats
    forward_network: Floats
    backward_scale_up: Floats
    backward_network: Floats

    def take(self, its: Ints) -> Work:
        return Work(*(taken(table, its) for table in self))


class LayerKinds:
    """Which layers of a model are of which of the `kinds`."""

    def __init__(self, model: Model, kinds: tuple[Kind, ...]):
        each = [kinds.index((model.window(layer), model.is_moe(layer))) for layer in range(model.layers)]
        self.layers = model.layers
        self.before = np.vstack((np.zeros(len(kinds)), np.eye(len(kinds))[each].cumsum(axis=0)))
        """[layers + 1, kinds]: of the layers before each, so many."""
        runs = [kind for kind, _ in groupby(each)]
        self.in_a_row = np.array([*(runs.count(kind) == 1 for kind in range(len(kinds))), False, False])
        """[kinds + 2]: whether all of a kind follow one another in the model."""


class Shape:
    """Which stages of a pipeline hold what, and how much each kind of stage does of each row of the tables."""

    def __init__(self, pipeline: Pipeline, layers: LayerKinds):
        self._layers = _Layers(pipeline, layers)
        self.pipeline, self.counts = pipeline, self._layers.of_first(np.array([self._layers.most]))[0]
        """[places, rows]."""
        self.places = np.array(placement(pipeline.schedule, pipeline.pp, pipeline.chunks))
        self.splits = pipeline.schedule in SPLIT_BACKWARD
        of_stages = [tuple(row) for row in self.counts[self.places].sum(axis=1).tolist()]
        different = sorted(set(of_stages))
        kinds, self.kind = np.array(different), np.array([*map(different.index, of_stages)])
        """[stages]: stages that hold the same layers are of one kind."""
        self.work = kinds
        """[kinds of stages, rows]."""
        # Of stages alike, the one furthest into the model waits longest.
        last = np.zeros(len(kinds), dtype=np.int64)
        last[self.kind] = np.arange(len(self.kind))
        self.first = self.places[last].min(axis=1)
        """[kinds of stages]: its first place, to which a micro-batch is sent as often."""
        self.ahead = _before(self.counts)[self.first]
        """[kinds of stages, rows]: what other stages do before it can begin."""
        several = (self.counts > 1)[self.places].any(axis=1) & layers.in_a_row
        twice = np.ones(kinds.shape, dtype=bool)
        np.logical_and.at(twice, self.kind, several)
        self.held: list[Held] = [
            tuple(row) for row in np.hstack((kinds, np.minimum(kinds, 1 + twice))).astype(np.int64).tolist()
        ]
        beside = np.concatenate((self.places - 1, self.places + 1), axis=1)
        elsewhere = (beside[:, :, None] != self.places[:, None]).all(axis=2)
        self.neighbours = (elsewhere & (beside >= 0) & (beside < self.places.size)).sum(axis=1)
        """[stages]: how many places beside its own are on other stages."""

    @cached_property
    def outer_stages(self) -> Ints:
        """Of each kind the first and the last: one of them holds most, micro-batches in flight or halves of backwards put off."""
        alike = [np.flatnonzero(self.kind == k) for k in range(len(self.work))]
        return np.array(sorted({at for its in alike for at in (its[0], its[-1])}))

    @cached_property
    def first_layers(self) -> Floats:
        """[layers + 1, places, rows]: what a place has of no layers, of its first, of its first two, and so on to all."""
        return self._layers.of_first(np.arange(self._layers.most + 1))

    @cached_property
    def first_ahead(self) -> Floats:
        """[layers + 1, kinds of stages, rows]: of what other stages do before, what belongs to so many of the first layers of each
        place."""
        return _before(self.first_layers)[:, self.first]

    @cached_property
    def first_work(self) -> Floats:
        """[layers + 1, kinds of stages, rows]: how many of the first layers of each place a stage holds, at the least."""
        of_stages = self.first_layers[:, self.places].sum(axis=2)
        return np.stack([of_stages[:, self.kind == k].min(axis=1) for k in range(len(self.work))], axis=1)


class Stages:
    """What each kind of stage of a pipeline does for one micro-batch; arrays are [kinds of stages, combinations]."""

    def __init__(self, shape: Shape, work: Work, m: Ints, hop: Floats):
        """`m`: micro-batches; `hop`: seconds of a send to the next stage."""
        self.shape, self.work, self.m, self.hop = shape, work, m, hop
        self.forward, self.backward = shape.work @ work.forward, shape.work @ work.backward

    @cached_property
    def forward_links(self) -> Floats:
        """[kinds of stages, links, combinations]: seconds that the links of a domain, and the network, are taken for."""
        return self._on(self.work.forward_scale_up, self.work.forward_network)

    @cached_property
    def backward_links(self) -> Floats:
        return self._on(self.work.backward_scale_up, self.work.backward_network)

    def _on(self, *links: Floats) -> Floats:
        return np.stack([self.shape.work @ link for link in links], axis=1)

    def take(self, its: Ints) -> Stages:
        return Stages(self.shape, self.work.take(its), self.m[its], self.hop[its])

    def bound(self, its: Ints | None = None, each: Floats | None = None, again: Floats | float = 0.0) -> Floats:
        """Seconds of all micro-batches; `each`: of one through each kind of stage, for the combinations `its` (with repeats);
        `again`: of the backward of the places before it, what runs the forward again."""
        m, (fill, drain, weights) = self.m, self._around
        if its is not None:
            m, fill, drain = m[its], taken(fill, its), taken(drain, its)
            weights = None if weights is None else taken(weights, its)
        drain = drain + again
        whole = m * (self.forward + self.backward if each is None else each)
        if weights is not None:
            return np.asarray((fill + np.maximum(whole, whole - weights + drain)).max(axis=0))
        return np.asarray((fill + whole + drain).max(axis=0))

    @cached_property
    def _around(self) -> tuple[Floats, Floats, Floats | None]:
        """Seconds until the first micro-batch arrives, and after the last one is gone; and of all weights' halves, which may be done
        meanwhile."""
        ahead, work = self.shape.ahead, self.work
        waited = self.shape.first[:, None] * self.hop
        fill, drain = ahead @ work.forward + waited, ahead @ work.backward + waited
        if not self.shape.splits:
            return fill, drain, None
        return fill, drain - ahead @ work.weight, self.m * (self.shape.work @ work.weight)

    def passing_bytes(self, boundary: Floats) -> Floats:
        """Activations of the micro-batches in flight, temporaries of the backward after them, and what waits to be sent."""
        outer = self.shape.outer_stages
        each, kind = Passing(self, boundary, outer).bytes(), self.shape.kind[outer]
        return np.stack([each[kind == k].max(axis=0) for k in range(len(self.shape.work))])

    @cached_property
    def working(self) -> Floats:
        """After the forward that fills a stage comes the backward of some chunk, which ends with a layer or the head: with one chunk
        surely the head, if it is there."""
        ends = self.shape.work > 0
        ends[:, EMBEDDING] = False
        if self.shape.pipeline.chunks == 1:
            ends[ends[:, HEAD], :HEAD] = False
        return np.stack([self.work.working[row].min(axis=0) for row in ends])


class Passing:
    """Bytes that come and go on some `stages` (indices)."""

    def __init__(self, of: Stages, boundary: Floats, stages: Ints):
        shape, p, m = of.shape, of.shape.pipeline, of.m
        places = shape.places[stages]
        self._saved = (shape.counts @ of.work.saved)[places]
        self._by_chunks = p.schedule == "interleaved"
        self._flights = (by_chunks if self._by_chunks else in_flight)(p, m)[stages].astype(np.float64)
        self._beside = np.minimum(2, m) * shape.neighbours[stages, None] * boundary + of.working[shape.kind[stages]]
        self._splits = shape.splits
        if self._splits:
            self._put_off = (shape.counts @ of.work.put_off)[places]
            self._held = held(p, m)[stages].astype(np.float64)
            self._deferred = deferred(p, m)[stages] * self._put_off.min(axis=1)

    def bytes(self, its: Ints | None = None, freed: Floats | float = 0.0) -> Floats:
        """[stages, n]: of the combinations `its`, of whose activations `freed`, [stages, chunks, n], is not kept."""

        def of(every: Floats) -> Floats:
            return every if its is None else taken(every, its)

        saved = of(self._saved) - freed
        least, flights = saved.min(axis=1), of(self._flights)
        passing = of(self._beside) + ((flights * saved).sum(axis=1) if self._by_chunks else flights * least)
        if not self._splits:
            return np.asarray(passing)
        # Of each micro-batch held there is what its forward saved, or what its weights' half needs: of those put off surely the latter.
        either = of(self._held) * np.minimum(saved, of(self._put_off)).min(axis=1)
        return np.asarray(np.maximum(passing, np.maximum(either, of(self._deferred))))


class _Layers:
    """Of what kinds the layers of each place are."""

    def __init__(self, pipeline: Pipeline, of: LayerKinds):
        layout = Layout(pp=pipeline.pp, schedule=pipeline.schedule, chunks=pipeline.chunks)
        chunks = sorted((chunk for its in stage_chunks(of.layers, layout) for chunk in its), key=lambda chunk: chunk.place)
        self._start, self._held = np.array([(chunk.layers.start, len(chunk.layers)) for chunk in chunks]).T
        self._before, self.most = of.before, max(self._held.tolist())

    def of_first(self, layers: Ints) -> Floats:
        """[layers, places, kinds + 2]: how many of the first so many layers of each place are of each kind; and whether it holds the
        embedding and the head."""
        first = np.minimum(layers[:, None], self._held)
        out = np.zeros((*first.shape, self._before.shape[1] + 2))
        out[..., :-2] = self._before[self._start + first] - self._before[self._start]
        out[:, 0, EMBEDDING] = out[:, -1, HEAD] = 1
        return out


def _before(counts: Floats) -> Floats:
    """[..., places, rows]: of the places before each."""
    return np.asarray(np.cumsum(counts, axis=-2) - counts)
