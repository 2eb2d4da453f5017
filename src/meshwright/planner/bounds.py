"""Lower bounds of step time and memory in closed form, for many layouts at once.

A stage s cannot begin before the first micro-batch has come through the places before it, works for all m micro-batches, and the
gradient of the last one still has to go back through those places:

    step >= max over s of   fill(s) + m * work(s) + drain(s)     + what follows the last backward

With a backward in two halves only the input's half is waited for, and the stage may do the weights' half while it waits:

    step >= max over s of   fill(s) + max(m * work(s), m * (work(s) - weight(s)) + drain(s))

The bound is exact for 1F1B with equal stages, and the published bubbles of the other schedules are never below it.
Communication of the state is priced in the fewest buckets that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Collective, CollectiveOp, Elementwise
from meshwright.planner.space import Bools, Floats, Ints, Pipeline, Sharding, Space
from meshwright.planner.tables import Kind, Tables
from meshwright.schedule.buckets import bucket_limit
from meshwright.schedule.orders import peak_held
from meshwright.schedule.stages import placement, stage_chunks
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES

SPLIT_BACKWARD = ("zb-h1", "zb-v", "dualpipe-v")


class Elements(NamedTuple):
    """Of the parameters of one stage: dense and routed, and of the dense those of the embedding and the head, and those without
    weight decay."""

    dense: int
    routed: int
    ends: int
    undecayed: int


@dataclass(frozen=True)
class Bounds:
    """Of the combinations `at` of a space under one pipeline and one sharding."""

    pipeline: Pipeline
    sharding: Sharding
    at: Ints
    seconds: Floats
    bytes: Floats


class ClosedForm:
    """Prices the combinations of a space."""

    def __init__(self, space: Space, estimator: Estimator, tables: Tables):
        self.space, self.estimator, self.tables = space, estimator, tables
        self.state_bytes = STATE_BYTES[space.precision]
        self.kernels = estimator.kernels(Layout(dp=space.gpus, precision=space.precision), shared=True)
        self._stages: dict[tuple[object, ...], list[float]] = {}

    @cached_property
    def least_seconds(self) -> Floats:
        """A bound of each combination whatever its schedule and sharding: its work shared out evenly over the stages."""
        model, tables = self.space.model, self.tables
        kinds = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
        counts = np.array([*(kinds.count(kind) for kind in tables.kinds), 1, 1])
        both = tables.pieces["forward"] + tables.pieces["backward"]
        return np.asarray(counts @ both * self.space.micro_batches / self.space.pp)

    def price(self, at: Ints, *, plain: bool = False) -> Iterator[Bounds]:
        """Bounds of the combinations `at` (ascending) under every pipeline and sharding that is legal for them. `plain`: under those
        that a person would try first."""
        for pp in np.unique(self.space.pp[at]).tolist():
            with_pp = at[self.space.pp[at] == pp]
            for pipeline in self.space.pipelines(pp):
                if plain and pipeline.chunks > 2:
                    continue
                these = with_pp[self.space.runs(pipeline, with_pp)]
                if len(these):
                    yield from self._pipeline(pipeline, these, plain)

    def _pipeline(self, pipeline: Pipeline, at: Ints, plain: bool) -> Iterator[Bounds]:
        stages = _Stages(pipeline, self.space, self.tables, at)
        m = self.space.micro_batches[at]
        hop, passing = self._hop(pipeline, at), stages.passing_bytes(m)
        for sharding in self.space.shardings:
            if plain and (sharding.shard or sharding.zero == 2):
                continue
            legal = self.space.can_shard(sharding, at)
            if not legal.any():
                continue
            state = self._state(pipeline, sharding, stages, at[legal])
            seconds = stages.bound(m, hop, legal, state, hides=self.estimator.times.hides)
            if self.estimator.cluster.node.compute_slots is not None and self.space.gpus > 1:
                seconds = np.maximum(seconds, stages.crowded[legal] * m[legal] / pipeline.pp)
            bytes_ = passing[:, legal] + state.bytes + self.estimator.overhead
            yield Bounds(pipeline, sharding, at[legal], seconds + state.end, bytes_.max(axis=0))

    def _hop(self, pipeline: Pipeline, at: Ints) -> Floats:
        """Seconds of a send between stages."""
        if pipeline.pp == 1:
            return np.zeros(len(at))
        columns = self.space.columns
        stride = columns.tp[at] * columns.cp[at] * columns.dp[at]
        rows = np.stack([stride, self.tables.boundary[at].astype(np.int64)], axis=1)
        unique, which = np.unique(rows, axis=0, return_inverse=True)
        seconds = self.estimator.times.seconds
        each = [seconds(Collective("pp", "send", pipeline.pp, int(s), int(b))) for s, b in unique.tolist()]
        return np.array(each)[which.ravel()]

    def _state(self, pipeline: Pipeline, sharding: Sharding, stages: _Stages, at: Ints) -> _State:
        """What parameters, gradients and optimizer state cost: the same for all that cut them alike."""
        columns = self.space.columns
        keys = (self.tables.split[at] * self.space.gpus + columns.cp[at]) * (self.space.gpus + 1) + self.space.dp[at]
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        values = np.array([self._state_of(pipeline, sharding, stages, int(at[i])) for i in first.tolist()])
        gather, again, reduction, rest, bytes_ = values.transpose(2, 1, 0)[:, stages.kind][:, :, which]
        hidden = stages.backward_of(at) if self.estimator.times.hides else 0.0
        return _State(gather, again, (np.maximum(0.0, reduction - hidden) + rest).max(axis=0), bytes_)

    def _state_of(self, pipeline: Pipeline, sharding: Sharding, stages: _Stages, at: int) -> list[list[float]]:
        """For each kind of stage: seconds gathering for forward, and for backward with what is reduced there, of the gradients'
        reduction, and of what follows it; bytes."""
        split, columns = int(self.tables.split[at]), self.space.columns
        cut = (sharding, *(int(x[at]) for x in (columns.tp, columns.cp, columns.dp, columns.ep, columns.etp)))
        out = []
        for elements in stages.elements(split):
            # The stage and its schedule do not matter, so that pipelines share what they agree on.
            if (elements, cut) not in self._stages:
                layout = self.space.layout(at, pipeline, sharding)
                self._stages[elements, cut] = self._state_of_stage(layout, split, elements)
            out.append(self._stages[elements, cut])
        return out

    def _state_of_stage(self, layout: Layout, split: int, its: Elements) -> list[float]:
        size = self.state_bytes
        in_forward = in_backward = reduction = rest = bytes_ = 0.0
        owned_all = 0
        dp_stride = layout.tp if layout.cp > 1 else layout.tp * layout.cp
        for elements, routes, cuts, ranks, stride in (
            (its.dense - its.undecayed, False, layout.state_shards, layout.data_ranks, dp_stride),
            (its.undecayed, False, layout.state_shards, layout.data_ranks, dp_stride),
            (its.routed, True, layout.expert_state_shards, layout.edp, layout.ep * layout.etp),
        ):
            if not elements:
                continue
            owned = elements // cuts
            owned_all += owned
            cap = self._cap(layout, split, routes)
            calls = partial(self._calls, "edp" if routes else "dp", cap=cap)
            gather = calls("all_gather", cuts, stride, elements, size.parameter)
            scatter = calls("reduce_scatter", cuts, stride, elements, size.gradient)
            replicas = calls("all_reduce", ranks // cuts, stride * cuts, owned, size.gradient, cap=-(-cap // cuts))
            if layout.zero == 3:
                in_forward += gather
                # The embedding and the head need not be gathered for backward.
                kept = elements if routes else max(0, elements - its.ends)
                in_backward += calls("all_gather", cuts, stride, kept, size.parameter)
            if layout.zero >= 2:
                in_backward += scatter
            if cuts == 1:
                reduction += replicas
            else:
                reduction += scatter if layout.zero < 2 else 0.0
                rest += replicas + (gather if layout.zero < 3 else 0.0)
            parameters = owned if layout.zero == 3 else elements
            gradients = owned if layout.zero >= 2 else elements
            bytes_ += parameters * size.parameter + gradients * size.gradient + owned * size.optimizer
        rest += self._optimizer(its.dense + its.routed, owned_all)
        return [in_forward, in_backward, reduction, rest, bytes_]

    def _cap(self, layout: Layout, split: int, routed: bool) -> int:
        """Elements of the largest bucket that there can be."""
        units = (self.tables.routed if routed else self.tables.dense)[:, split].max() if layout.zero == 3 else 0
        return max(bucket_limit(layout, routed), int(self.tables.largest[int(routed), split]), int(units))

    def _calls(self, axis: str, op: CollectiveOp, group: int, stride: int, elements: int, size: int, *, cap: int) -> float:
        """Seconds for `elements` in the fewest buckets."""
        if group == 1 or not elements:
            return 0.0
        seconds, (full, rest) = self.estimator.times.seconds, divmod(elements, cap)
        whole = full * seconds(Collective(axis, op, group, stride, cap * size)) if full else 0.0
        return whole + (seconds(Collective(axis, op, group, stride, rest * size)) if rest else 0.0)

    def _optimizer(self, whole: int, owned: int) -> float:
        """As `cost/program.py` has it, without padding."""
        size = self.state_bytes
        moved = owned * (2 * (size.optimizer + size.parameter) + size.gradient) + (whole + 3 * owned) * size.gradient
        return self.kernels.elementwise(Elementwise("optimizer", moved))


@dataclass(frozen=True)
class _State:
    """[stages, combinations]; `end` is of the slowest stage."""

    gather: Floats
    again: Floats
    end: Floats
    bytes: Floats


class _Stages:
    """What each stage of a pipeline does for one micro-batch of the combinations `at`; arrays are [stages, at]."""

    def __init__(self, pipeline: Pipeline, space: Space, tables: Tables, at: Ints):
        self.pipeline, self.tables, self.at = pipeline, tables, at
        self.places = np.array(placement(pipeline.schedule, pipeline.pp, pipeline.chunks))
        self.counts = _counts(pipeline, space, tables.kinds)
        f, b, w = (self.counts @ tables.pieces[name][:, at] for name in ("forward", "backward", "weight"))
        self.split = pipeline.schedule in SPLIT_BACKWARD
        goes_back = b - w if self.split else b
        first = self.places.min(axis=1)
        self.fill = (np.cumsum(f, axis=0) - f)[first]
        self.drain = (np.cumsum(goes_back, axis=0) - goes_back)[first]
        self.hops = first[:, None]
        self.forward, self.backward, self.weight = (x[self.places].sum(axis=1) for x in (f, b, w))
        self._elements: dict[int, list[Elements]] = {}
        self._kinds, kind = np.unique(self.counts[self.places].sum(axis=1), axis=0, return_inverse=True)
        self.kind = kind.ravel()
        """[stages]: stages that hold the same layers are of one kind."""

    @cached_property
    def crowded(self) -> Floats:
        """[at]: seconds of all stages while every rank of the node computes."""
        return np.asarray(self.counts.sum(axis=0) @ self.tables.pieces["crowded"][:, self.at])

    def bound(self, m: Ints, hop: Floats, legal: Bools, state: _State, *, hides: bool) -> Floats:
        """Seconds of all micro-batches."""
        forward, backward = self.forward[:, legal], self.backward[:, legal]
        if hides:
            forward, backward = np.maximum(forward, state.gather), np.maximum(backward, state.again)
        else:
            forward, backward = forward + state.gather, backward + state.again
        travels = self.hops * hop[legal]
        fill, drain = self.fill[:, legal] + travels, self.drain[:, legal] + travels
        work = m[legal] * (forward + backward)
        if self.split:
            return np.asarray((fill + np.maximum(work, work - m[legal] * self.weight[:, legal] + drain)).max(axis=0))
        return np.asarray((fill + work + drain).max(axis=0))

    def backward_of(self, at: Ints) -> Floats:
        """Of one micro-batch, of those of the combinations that are `at`."""
        return np.asarray(self.backward[:, np.searchsorted(self.at, at)])

    def passing_bytes(self, m: Ints) -> Floats:
        """Activations of the micro-batches in flight, the largest temporary, and what waits to be sent."""
        p, tables = self.pipeline, self.tables
        saved = (self.counts @ tables.pieces["saved"][:, self.at])[self.places]
        sizes, which = np.unique(m, return_inverse=True)
        if p.schedule == "interleaved":
            flights = np.stack([_interleaved_held(p, size) for size in sizes.tolist()], axis=2)[:, :, which]
            activations = (flights * saved).sum(axis=1)
        else:
            activations = np.stack([_held(p, size) for size in sizes.tolist()], axis=1)[:, which] * saved.min(axis=1)
        # A piece that a stage does not hold has no temporaries there.
        held = self._kinds > 0
        working = np.stack([tables.pieces["working"][row][:, self.at].max(axis=0) for row in held])[self.kind]
        return np.asarray(activations + working + 2 * self._neighbours[:, None] * tables.boundary[self.at])

    @cached_property
    def _neighbours(self) -> Ints:
        """How many places beside those of a stage are on other stages."""
        last = self.places.size - 1
        return np.array(
            [
                sum(n not in its for place in its for n in (place - 1, place + 1) if 0 <= n <= last)
                for its in self.places.tolist()
            ]
        )

    def elements(self, split: int) -> list[Elements]:
        """The parameters of each kind of stage."""
        if split not in self._elements:
            tables = self.tables
            dense, routed, undecayed = (self._kinds @ x[:, split] for x in (tables.dense, tables.routed, tables.undecayed))
            ends = self._kinds[:, -2:] @ tables.dense[-2:, split]
            rows = np.stack([dense, routed, ends, undecayed], axis=1).astype(np.int64).tolist()
            self._elements[split] = [Elements(*row) for row in rows]
        return self._elements[split]


@lru_cache(maxsize=4096)
def _held(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages]: chunks in flight."""
    p = pipeline
    return np.array([peak_held(p.schedule, stage, p.pp, micro_batches, p.chunks) for stage in range(p.pp)])


@lru_cache(maxsize=4096)
def _interleaved_held(pipeline: Pipeline, micro_batches: int) -> Ints:
    """[stages, chunks]: in flight at the end of the warm-up, whose forwards take the chunks in rounds of one a stage."""
    p = pipeline
    held = [peak_held(p.schedule, stage, p.pp, micro_batches, p.chunks) for stage in range(p.pp)]
    return np.array([[sum(t // p.pp % p.chunks == c for t in range(turns)) for c in range(p.chunks)] for turns in held])


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
