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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Collective, CollectiveOp, Elementwise
from meshwright.planner.space import Bools, Floats, Ints, Pipeline, Sharding, Space
from meshwright.planner.tables import Kind, ShardSizes, Tables
from meshwright.schedule.buckets import bucket_limit
from meshwright.schedule.orders import peak_held
from meshwright.schedule.stages import placement, stage_chunks
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES

SPLIT_BACKWARD = ("zb-h1", "zb-v", "dualpipe-v")


Held = tuple[int, ...]
"""How many of each kind of layer, of embeddings and of heads a stage holds."""
Bunch = tuple[int, int]
"""(so many, elements each): parameters that go together over the wire."""


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
            passes = stages.forward[:, legal], stages.backward[:, legal]
            added = state.gather, state.again
            if self.estimator.times.hides:
                added = self._beside(added[0], passes[0]), self._beside(added[1], passes[1])
            seconds = stages.bound(m[legal], hop[legal], legal, passes[0] + passes[1] + added[0] + added[1])
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
        gather, again, reduction, rest, bytes_ = values.transpose(2, 1, 0)[:, :, which]
        if self.estimator.times.hides:
            reduction = self._beside(reduction, stages.backward_of(at))
        return _State(gather, again, (reduction + rest).max(axis=0), bytes_)

    def _beside(self, seconds: Floats, work: Floats) -> Floats:
        """As the estimator has it: what communication adds to computation that it runs beside."""
        return np.asarray(np.maximum(0.0, seconds - work) + self.estimator.constants.beside * np.minimum(seconds, work))

    def _state_of(self, pipeline: Pipeline, sharding: Sharding, stages: _Stages, at: int) -> list[list[float]]:
        """For each kind of stage: seconds gathering for forward, and for backward with what is reduced there, of the gradients'
        reduction, and of what follows it; bytes."""
        split, columns = int(self.tables.split[at]), self.space.columns
        cut = (sharding, *(int(x[at]) for x in (columns.tp, columns.cp, columns.dp, columns.ep, columns.etp)))
        out = []
        for held in stages.held:
            # The stage and its schedule do not matter, so that pipelines share what they agree on.
            if (held, cut) not in self._stages:
                layout = self.space.layout(at, pipeline, sharding)
                self._stages[held, cut] = self._state_of_stage(layout, self.tables.shards[split], held)
            out.append(self._stages[held, cut])
        return out

    def _state_of_stage(self, layout: Layout, sizes: tuple[ShardSizes, ...], held: Held) -> list[float]:
        size = self.state_bytes
        in_forward = in_backward = reduction = rest = bytes_ = 0.0
        owned_all = elements_all = 0
        for group in _groups(layout):
            parts = [(count, group.sizes(of)) for count, of in zip(held, sizes, strict=True)]
            elements = sum(count * sum(part) for count, part in parts)
            if not elements:
                continue
            cuts, owned = group.cuts, elements // group.cuts
            owned_all, elements_all = owned_all + owned, elements_all + elements
            bunches = _bunches(layout, parts, group)
            calls = partial(self._calls, group.axis)
            gather = calls("all_gather", cuts, group.stride, bunches, size.parameter)
            scatter = calls("reduce_scatter", cuts, group.stride, bunches, size.gradient)
            shares = [(count, each // cuts) for count, each in bunches]
            replicas = calls("all_reduce", group.ranks // cuts, group.stride * cuts, shares, size.gradient)
            if group.comes_and_goes:
                in_forward += gather
                # The embedding and the head need not be gathered for backward.
                layers = _bunches(layout, parts[:-2], group)
                in_backward += calls("all_gather", cuts, group.stride, layers, size.parameter)
            if layout.zero >= 2:
                in_backward += scatter
            if cuts == 1:
                reduction += replicas
            else:
                reduction += scatter if layout.zero < 2 else 0.0
                rest += replicas + (0.0 if group.comes_and_goes else gather)
            parameters = owned if group.comes_and_goes else elements
            gradients = owned if layout.zero >= 2 else elements
            bytes_ += parameters * size.parameter + gradients * size.gradient + owned * size.optimizer
        rest += self._optimizer(elements_all, owned_all)
        return [in_forward, in_backward, reduction, rest, bytes_]

    def _calls(self, axis: str, op: CollectiveOp, group: int, stride: int, bunches: Sequence[Bunch], size: int) -> float:
        """Seconds of a call for each bunch."""
        if group == 1:
            return 0.0
        seconds = self.estimator.times.seconds
        return sum(count * seconds(Collective(axis, op, group, stride, each * size)) for count, each in bunches if each)

    def _optimizer(self, whole: int, owned: int) -> float:
        """As `cost/program.py` has it, without padding."""
        size = self.state_bytes
        moved = owned * (2 * (size.optimizer + size.parameter) + size.gradient) + (whole + 3 * owned) * size.gradient
        return self.kernels.elementwise(Elementwise("optimizer", moved))


@dataclass(frozen=True)
class _State:
    """[kinds of stages, combinations]; `end` is of the slowest stage."""

    gather: Floats
    again: Floats
    end: Floats
    bytes: Floats


class _Stages:
    """What each kind of stage of a pipeline does for one micro-batch of the combinations `at`; arrays are [kinds of stages, at]."""

    def __init__(self, pipeline: Pipeline, space: Space, tables: Tables, at: Ints):
        self.pipeline, self.tables, self.at = pipeline, tables, at
        self.places = np.array(placement(pipeline.schedule, pipeline.pp, pipeline.chunks))
        self.counts = _counts(pipeline, space, tables.kinds)
        f, b, w = (self.counts @ tables.pieces[name][:, at] for name in ("forward", "backward", "weight"))
        self.split = pipeline.schedule in SPLIT_BACKWARD
        goes_back = b - w if self.split else b
        self._kinds, kind = np.unique(self.counts[self.places].sum(axis=1), axis=0, return_inverse=True)
        self.kind = kind.ravel()
        """[stages]: stages that hold the same layers are of one kind."""
        # Of stages alike, the one furthest into the model waits longest.
        furthest = [int(np.flatnonzero(self.kind == k)[-1]) for k in range(len(self._kinds))]
        its = self.places[furthest]
        first = its.min(axis=1)
        self.fill = (np.cumsum(f, axis=0) - f)[first]
        self.drain = (np.cumsum(goes_back, axis=0) - goes_back)[first]
        self.hops = first[:, None]
        self.forward, self.backward, self.weight = (x[its].sum(axis=1) for x in (f, b, w))

    @cached_property
    def crowded(self) -> Floats:
        """[at]: seconds of all stages while every rank of the node computes."""
        return np.asarray(self.counts.sum(axis=0) @ self.tables.pieces["crowded"][:, self.at])

    def bound(self, m: Ints, hop: Floats, legal: Bools, each: Floats) -> Floats:
        """Seconds of all `m` micro-batches of those that are `legal`; `each`: of one through each kind of stage."""
        travels = self.hops * hop
        fill, drain, work = self.fill[:, legal] + travels, self.drain[:, legal] + travels, m * each
        if self.split:
            return np.asarray((fill + np.maximum(work, work - m * self.weight[:, legal] + drain)).max(axis=0))
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
            activations = np.stack([_in_flight(p, size) for size in sizes.tolist()], axis=1)[:, which] * saved.min(axis=1)
        # A piece that a stage does not hold has no temporaries there.
        held = self._kinds > 0
        working = np.stack([tables.pieces["working"][row][:, self.at].max(axis=0) for row in held])
        passing = activations + 2 * self._neighbours[:, None] * tables.boundary[self.at]
        return np.asarray(np.stack([passing[self.kind == k].max(axis=0) for k in range(len(held))]) + working)

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

    @cached_property
    def held(self) -> list[Held]:
        """What each kind of stage holds."""
        return [tuple(row) for row in self._kinds.astype(np.int64).tolist()]


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters that share buckets, and the ranks that share them."""

    fields: tuple[str, ...]
    axis: str
    cuts: int
    ranks: int
    stride: int
    comes_and_goes: bool = False
    """ZeRO-3's: gathered layer by layer."""

    @property
    def routed(self) -> bool:
        return self.axis == "edp"

    def sizes(self, of: ShardSizes) -> tuple[int, ...]:
        return tuple(n for name in self.fields for n in getattr(of, name))


def _groups(layout: Layout) -> tuple[_Group, ...]:
    dense = ("dp", layout.state_shards, layout.data_ranks, layout.tp if layout.cp > 1 else layout.tp * layout.cp)
    routed = ("edp", layout.expert_state_shards, layout.edp, layout.ep * layout.etp)
    if layout.zero < 3:
        return (
            _Group(("matrices", "routers"), *dense),
            _Group(("vectors",), *dense),
            _Group(("experts", "expert_vectors"), *routed),
        )
    return (
        _Group(("matrices",), *dense, comes_and_goes=True),
        _Group(("routers", "vectors"), *dense),
        _Group(("experts",), *routed, comes_and_goes=True),
        _Group(("expert_vectors",), *routed),
    )


def _bunches(layout: Layout, parts: Sequence[tuple[int, Sequence[int]]], group: _Group) -> list[Bunch]:
    """The fewest that there can be: what is gathered layer by layer goes so; else what is larger than a bucket goes alone, and the
    rest in full buckets."""
    if group.comes_and_goes:
        return [(count, sum(part)) for count, part in parts if count]
    limit = bucket_limit(layout, group.routed)
    out = [(count, each) for count, part in parts for each in part if count and each > limit]
    full, rest = divmod(sum(count * each for count, part in parts for each in part if each <= limit), limit)
    return [*out, (full, limit), (1, rest)]


@lru_cache(maxsize=4096)
def _in_flight(pipeline: Pipeline, micro_batches: int) -> Ints:
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
