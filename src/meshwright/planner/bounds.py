"""Lower bounds of step time and memory in closed form, for many layouts at once.

A stage s cannot begin before the first micro-batch has come through the places before it, works for all m micro-batches, and the
gradient of the last one still has to go back through those places:

    step >= max over s of   fill(s) + m * work(s) + drain(s)     + what follows the last backward

With a backward in two halves only the input's half is waited for, and the stage may do the weights' half while it waits:

    step >= max over s of   fill(s) + max(m * work(s), m * (work(s) - weight(s)) + drain(s))

The bound is exact for 1F1B with equal stages, and the published bubbles of the other schedules are never below it.
What the state costs beside is in `state.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Collective
from meshwright.planner.space import Bools, Floats, Ints, Pipeline, Space
from meshwright.planner.state import BACKWARD, BYTES, FORWARD, REDUCTION, REST, Held, StatePrices
from meshwright.planner.tables import Kind, Tables
from meshwright.schedule.orders import peak_deferred, peak_held, peak_in_flight
from meshwright.schedule.stages import placement, stage_chunks
from meshwright.spec.layout import Layout

SPLIT_BACKWARD = ("zb-h1", "zb-v", "dualpipe-v")
EMBEDDING, HEAD = -2, -1
"""Their rows in the tables."""


@dataclass(frozen=True)
class Bounds:
    """Of layouts under one pipeline: each is a combination `at` of a space with a `sharding` (indices)."""

    pipeline: Pipeline
    sharding: Ints
    at: Ints
    seconds: Floats
    bytes: Floats


class ClosedForm:
    """Prices the combinations of a space."""

    def __init__(self, space: Space, estimator: Estimator, tables: Tables):
        self.space, self.estimator, self.tables = space, estimator, tables
        self.state = StatePrices(space, estimator, tables)
        self._shapes: dict[Pipeline, _Shape] = {}

    @cached_property
    def least_seconds(self) -> Floats:
        """A bound of each combination whatever its schedule and sharding: its work shared out evenly over the stages."""
        model, tables = self.space.model, self.tables
        kinds = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
        counts = np.array([*(kinds.count(kind) for kind in tables.kinds), 1, 1], dtype=float)
        return np.asarray(tables.seconds(counts) * self.space.micro_batches / self.space.pp)

    def price(self, at: Ints, *, below: float | Floats = float("inf"), plain: bool = False) -> Iterator[Bounds]:
        """Bounds of the combinations `at` (ascending) under every pipeline and sharding that is legal for them.

        What cannot take less than `below` seconds (of all, or of each) may be left out. `plain`: only what a person would try first.
        """
        below = np.broadcast_to(below, at.shape)
        shardings = [not plain or (s.shard is None and s.zero != 2) for s in self.space.shardings]
        for pp in np.unique(self.space.pp[at]).tolist():
            mine = self.space.pp[at] == pp
            its, limit = at[mine], below[mine]
            legal = np.stack(
                [self.space.can_shard(s, its) & use for s, use in zip(self.space.shardings, shardings, strict=True)]
            )
            work = _Work(*(self.tables.of(name, its) for name in _Work._fields))
            for pipeline in self.space.pipelines(pp):
                if not plain or pipeline.chunks <= 2:
                    runs = np.flatnonzero(self.space.runs(pipeline, its))
                    if len(runs):
                        yield from self._pipeline(pipeline, its[runs], work.take(runs), legal[:, runs], limit[runs])

    def _pipeline(self, pipeline: Pipeline, at: Ints, work: _Work, legal: Bools, below: Floats) -> Iterator[Bounds]:
        shape = self._shape(pipeline)
        m, hop = self.space.micro_batches[at], self._hop(pipeline, at)
        stages = _Stages(shape, work)
        quick = np.flatnonzero(stages.bound(m, hop) < below)
        if not len(quick):
            return
        if len(quick) < len(at):
            at, m, hop, legal = at[quick], m[quick], hop[quick], legal[:, quick]
            stages = _Stages(shape, work.take(quick))
        sharding, its = np.nonzero(legal)
        forward, backward = stages.forward[:, its], stages.backward[:, its]
        prices = self.state.price(shape.held, at[its], sharding)
        forward_links, backward_links = stages.forward_links[:, :, its], stages.backward_links[:, :, its]
        gather = self._exposed(prices[:, FORWARD], forward, forward_links)
        again = self._exposed(prices[:, BACKWARD], backward, backward_links)
        reduction = self._exposed(prices[:, REDUCTION], backward + again, backward_links)
        rest, bytes_ = prices[:, REST], prices[:, BYTES]
        seconds = stages.bound(m, hop, its, forward + backward + gather + again)
        if self.estimator.cluster.node.compute_slots is not None and self.space.gpus > 1:
            crowded = shape.counts.sum(axis=0) @ self.tables.of("crowded", at)
            seconds = np.maximum(seconds, (crowded * m)[its] / pipeline.pp)
        passing = stages.passing_bytes(m, self.tables.boundary[at])
        bytes_ = passing[:, its] + bytes_ + self.estimator.overhead
        yield Bounds(pipeline, sharding, at[its], seconds + (reduction + rest).max(axis=0), bytes_.max(axis=0))

    def _shape(self, pipeline: Pipeline) -> _Shape:
        if pipeline not in self._shapes:
            self._shapes[pipeline] = _Shape(pipeline, _counts(pipeline, self.space, self.tables.kinds), self._in_a_row)
        return self._shapes[pipeline]

    @cached_property
    def _in_a_row(self) -> Bools:
        model = self.space.model
        kinds = [kind for kind, _ in groupby((model.window(i), model.is_moe(i)) for i in range(model.layers))]
        return np.array([*(kinds.count(kind) == 1 for kind in self.tables.kinds), False, False])

    def _hop(self, pipeline: Pipeline, at: Ints) -> Floats:
        """Seconds of a send between stages."""
        if pipeline.pp == 1:
            return np.zeros(len(at))
        columns = self.space.columns
        stride = columns.tp[at] * columns.cp[at] * columns.dp[at]
        keys = stride * 2**44 + self.tables.boundary[at].astype(np.int64)
        unique, which = np.unique(keys, return_inverse=True)
        seconds = self.estimator.times.seconds
        each = [seconds(Collective("pp", "send", pipeline.pp, *divmod(key, 2**44))) for key in unique.tolist()]
        return np.asarray(np.array(each)[which])

    def _exposed(self, sent: Floats, work: Floats, own: Floats) -> Floats:
        """As the estimator has it: what communication, [stages, links, n], adds to computation that it runs beside, which has its `own` on
        the links."""
        seconds = sent.sum(axis=1)
        if not self.estimator.times.hides:
            return np.asarray(seconds)
        left = np.maximum(0.0, np.maximum(seconds, (sent + own).max(axis=1)) - work)
        left = np.minimum(seconds, left)
        return np.asarray(left + self.estimator.constants.beside * (seconds - left))


class _Work(NamedTuple):
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

    def take(self, its: Ints) -> _Work:
        return _Work(*(table[:, its] for table in self))


class _Shape:
    """Which stages of a pipeline hold what, and how much each kind of stage does of each row of the tables."""

    def __init__(self, pipeline: Pipeline, counts: Floats, in_a_row: Bools):
        """`counts`: [places, rows]; `in_a_row`: [rows], whether all layers of a kind follow one another in the model."""
        self.pipeline, self.counts = pipeline, counts
        self.places = np.array(placement(pipeline.schedule, pipeline.pp, pipeline.chunks))
        self.splits = pipeline.schedule in SPLIT_BACKWARD
        kinds, kind = np.unique(counts[self.places].sum(axis=1), axis=0, return_inverse=True)
        self.kind = kind.ravel()
        """[stages]: stages that hold the same layers are of one kind."""
        self.work = kinds
        """[kinds of stages, rows]."""
        # Of stages alike, the one furthest into the model waits longest.
        first = np.array([self.places[np.flatnonzero(self.kind == k)[-1]].min() for k in range(len(kinds))])
        self.ahead = (np.cumsum(counts, axis=0) - counts)[first]
        """[kinds of stages, rows]: what other stages do before it can begin."""
        self.hops = first[:, None]
        several = (counts > 1)[self.places].any(axis=1) & in_a_row
        twice = np.stack([several[self.kind == k].all(axis=0) for k in range(len(kinds))])
        self.held: list[Held] = [
            tuple(row) for row in np.hstack((kinds, np.minimum(kinds, 1 + twice))).astype(np.int64).tolist()
        ]
        last = self.places.size - 1
        self.neighbours = np.array(
            [
                sum(n not in its for place in its for n in (place - 1, place + 1) if 0 <= n <= last)
                for its in self.places.tolist()
            ]
        )
        """[stages]: how many places beside its own are on other stages."""


class _Stages:
    """What each kind of stage of a pipeline does for one micro-batch; arrays are [kinds of stages, combinations]."""

    def __init__(self, shape: _Shape, work: _Work):
        self.shape, self.work = shape, work
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

    def bound(self, m: Ints, hop: Floats, its: Ints | None = None, each: Floats | None = None) -> Floats:
        """Seconds of all `m` micro-batches; `each`: of one through each kind of stage, for the combinations `its` (with repeats)."""
        ahead, work = self.shape.ahead, self.work
        waited = self.shape.hops * hop
        fill, drain, weights = ahead @ work.forward + waited, ahead @ work.backward + waited, None
        if self.shape.splits:
            weights = m * (self.shape.work @ work.weight)
            drain -= ahead @ work.weight
        if its is not None:
            m, fill, drain = m[its], fill[:, its], drain[:, its]
            weights = None if weights is None else weights[:, its]
        whole = m * (self.forward + self.backward if each is None else each)
        if weights is not None:
            return np.asarray((fill + np.maximum(whole, whole - weights + drain)).max(axis=0))
        return np.asarray((fill + whole + drain).max(axis=0))

    def passing_bytes(self, m: Ints, boundary: Floats) -> Floats:
        """Activations of the micro-batches in flight, temporaries of the backward after them, and what waits to be sent."""
        shape, p = self.shape, self.shape.pipeline
        saved = (shape.counts @ self.work.saved)[shape.places]
        sizes, which = np.unique(m, return_inverse=True)
        if p.schedule == "interleaved":
            flights = np.stack([_interleaved_held(p, size) for size in sizes.tolist()], axis=2)[:, :, which]
            activations = (flights * saved).sum(axis=1)
        else:
            activations = np.stack([_in_flight(p, size) for size in sizes.tolist()], axis=1)[:, which] * saved.min(axis=1)
        # After the forward that fills a stage comes the backward of some chunk, which ends with a layer or the head: with one chunk
        # surely the head, if it is there.
        ends = shape.work > 0
        ends[:, EMBEDDING] = False
        if p.chunks == 1:
            ends[ends[:, HEAD], :HEAD] = False
        working = np.stack([self.work.working[row].min(axis=0) for row in ends])
        passing = activations + np.minimum(2, m) * shape.neighbours[:, None] * boundary
        bound = np.stack([passing[shape.kind == k].max(axis=0) for k in range(len(working))]) + working
        if not shape.splits:
            return np.asarray(bound)
        # Of each micro-batch held there is what its forward saved, or what its weights' half needs: of those put off surely the latter.
        put_off = (shape.counts @ self.work.put_off)[shape.places]
        held, deferred = (np.stack([of(p, size) for size in sizes.tolist()], axis=1)[:, which] for of in (_held, _deferred))
        least = np.maximum(held * np.minimum(saved, put_off).min(axis=1), deferred * put_off.min(axis=1))
        most = np.stack([least[shape.kind == k].max(axis=0) for k in range(len(working))])
        return np.asarray(np.maximum(bound, most))


@lru_cache(maxsize=4096)
def _in_flight(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages]: chunks in flight. What the second half of a split backward still needs of others may be next to nothing."""
    p = pipeline
    return np.array([peak_in_flight(p.schedule, stage, p.pp, micro_batches, p.chunks) for stage in range(p.pp)])


@lru_cache(maxsize=4096)
def _held(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages]: chunks of which anything is there, be it for the weights' half of a backward."""
    p = pipeline
    return np.array([peak_held(p.schedule, stage, p.pp, micro_batches, p.chunks) for stage in range(p.pp)])


@lru_cache(maxsize=4096)
def _deferred(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages]: chunks whose weights' half is put off."""
    p = pipeline
    return np.array([peak_deferred(p.schedule, stage, p.pp, micro_batches) for stage in range(p.pp)])


@lru_cache(maxsize=4096)
def _interleaved_held(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages, chunks]: in flight at the end of the warm-up, whose forwards take the chunks in rounds of one a stage."""
    p = pipeline
    rounds, left = np.divmod(_in_flight(pipeline, micro_batches), p.pp * p.chunks)
    return np.asarray(rounds[:, None] * p.pp + np.clip(left[:, None] - p.pp * np.arange(p.chunks), 0, p.pp))


def _counts(pipeline: Pipeline, space: Space, kinds: tuple[Kind, ...]) -> Floats:
    """[places, kinds + 2]: how many layers of each kind a place holds, and whether it holds the embedding and the head."""
    model = space.model
    layout = Layout(pp=pipeline.pp, schedule=pipeline.schedule, chunks=pipeline.chunks)
    out = np.zeros((pipeline.pp * pipeline.chunks, len(kinds) + 2))
    for chunk in (chunk for chunks in stage_chunks(model.layers, layout) for chunk in chunks):
        for layer in chunk.layers:
            out[chunk.place, kinds.index((model.window(layer), model.is_moe(layer)))] += 1
        out[chunk.place, -2:] = chunk.first, chunk.last
    return out
