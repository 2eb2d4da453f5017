"""Lower bounds of step time and memory in closed form, for many layouts at once.

A stage s cannot begin before the first micro-batch has come through the places before it, works for all m micro-batches, and the
gradient of the last one still has to go back through those places:

    step >= max over s of   fill(s) + m * work(s) + drain(s)     + what follows the last backward

With a backward in two halves only the input's half is waited for, and the stage may do the weights' half while it waits:

    step >= max over s of   fill(s) + max(m * work(s), m * (work(s) - weight(s)) + drain(s))

The bound is exact for 1F1B with equal stages, and the published bubbles of the other schedules are never below it.
What the state costs beside is in `state.py`, what stages do and keep in `shapes.py`, what recompute changes in `relief.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.offload import host_room
from meshwright.cost.ops import Collective
from meshwright.planner.arrays import Bools, Floats, Ints, distinct, taken
from meshwright.planner.figures import LayerFigures
from meshwright.planner.relief import ReliefFigures
from meshwright.planner.shapes import LayerKinds, Passing, Shape, Stages, Work
from meshwright.planner.space import Pipeline, Relief, Space
from meshwright.planner.state import (
    BACKWARD,
    BYTES,
    COMING,
    FORWARD,
    LARGEST,
    OPTIMIZER,
    REDUCTION,
    REST,
    RETURNING,
    UPDATE,
    StatePrices,
)
from meshwright.planner.tables import kinds_of, make_tables
from meshwright.schedule.buckets import AHEAD, IN_TURN
from meshwright.spec.layout import Layout, Offload
from meshwright.spec.precision import STATE_BYTES

FULL = Relief("full")
UNLIKELY = 4.0
"""Times as late a combination is looked at that does not seem to fit."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Of layouts under one pipeline: each is a combination `at` of the space of a `form` with a `sharding` and a `relief` (indices), with
    which so many `layers` of each chunk run again."""

    form: ClosedForm
    pipeline: Pipeline
    at: Ints
    sharding: Ints
    relief: Ints
    layers: Ints
    seconds: Floats
    bytes: Floats

    def take(self, rows: Ints) -> Bounds:
        fields = ("at", "sharding", "relief", "layers", "seconds", "bytes")
        return Bounds(self.form, self.pipeline, *(getattr(self, name)[rows] for name in fields))

    def layout(self, row: int, layers: int | None = None) -> Layout:
        """`layers`: that run again, if not as many as the bound has."""
        space, again = self.form.space, int(self.layers[row]) if layers is None else layers
        sharding, relief = space.shardings[self.sharding[row]], space.reliefs[self.relief[row]]
        return space.layout(int(self.at[row]), self.pipeline, sharding, relief, again)


class ClosedForm:
    """Prices the combinations of a space."""

    def __init__(self, space: Space, estimator: Estimator, like: ClosedForm | None = None):
        """`like`: one of the same problem, whose figures are known already."""
        self.space, self.estimator = space, estimator
        self.figures: LayerFigures = like.figures if like else LayerFigures(space, estimator)
        self.reliefs: ReliefFigures = like.reliefs if like else ReliefFigures(space, estimator, kinds_of(space))
        self.tables = make_tables(space, self.figures)
        self.state = StatePrices(space, estimator, self.tables)
        self._shapes: dict[Pipeline, Shape] = like._shapes if like else {}
        self._layers = LayerKinds(space.model, self.tables.kinds)

    @cached_property
    def least_seconds(self) -> Floats:
        """A bound of each combination whatever its schedule, sharding and relief: its work shared out evenly over the stages."""
        return np.asarray(self.tables.total(("forward", "backward"), self._rows) * self.space.micro_batches / self.space.pp)

    @cached_property
    def least_in_any_order(self) -> Floats:
        """The same whatever the order of ranks: tp has the quickest links already, and cp sends nothing."""
        spared = self.tables.total(("context",), self._rows) * self.space.micro_batches / self.space.pp
        inside = self.space.columns.tp * self.space.columns.cp <= self.space.domain
        return np.asarray(self.least_seconds - np.where(inside, 0.0, spared))

    @cached_property
    def likely_seconds(self) -> Floats:
        """Of each combination what its step may take, to begin with those that are likely to be good: with the bubble of 1F1B, and several
        times as long where state under ZeRO-1 and micro-batches in flight do not fit."""
        space, size = self.space, STATE_BYTES[self.space.precision]
        columns, (dense, routed) = space.columns, self.tables.elements(self._rows)
        ranks = columns.dp * columns.cp
        copies = ranks * columns.tp / (columns.ep * columns.etp)
        held = (dense + routed) * (size.parameter + size.gradient) + (dense / ranks + routed / copies) * size.optimizer
        held = (
            held / space.pp
            + self.tables.total(("saved",), self._rows) * np.minimum(space.micro_batches, space.pp) / space.pp
        )
        fits = held + self.estimator.overhead < self.estimator.cluster.accelerator.memory_bytes
        return np.asarray(self.least_seconds * (1 + (space.pp - 1) / space.micro_batches) * np.where(fits, 1.0, UNLIKELY))

    @cached_property
    def likely(self) -> Ints:
        """The combinations, those likely to be good first."""
        return np.argsort(self.likely_seconds, kind="stable")

    @cached_property
    def _rows(self) -> Floats:
        """How many of each row of the tables the model has."""
        model = self.space.model
        kinds = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
        return np.array([*(kinds.count(kind) for kind in self.tables.kinds), 1, 1], dtype=float)

    def ordered(self, at: Ints, order: Ints) -> ClosedForm:
        """Of the combinations `at`, each with its ranks in another order."""
        return ClosedForm(self.space.ordered(at, order), self.estimator, self)

    def price(self, at: Ints, *, below: float | Floats = float("inf"), plain: bool = False) -> Iterator[Bounds]:
        """Bounds of the combinations `at` (ascending) under every pipeline and sharding that is legal for them, without relief.

        What cannot take less than `below` seconds (of all, or of each) may be left out. `plain`: only what a person would try first.
        """
        below, limited = np.broadcast_to(below, at.shape), bool(np.isfinite(below).any())
        shardings = [not plain or (s.shard is None and s.zero != 2) for s in self.space.shardings]
        for pp in distinct(self.space.pp[at]).keys.tolist():
            mine = self.space.pp[at] == pp
            its, limit = at[mine], below[mine]
            legal = np.stack(
                [self.space.can_shard(s, its) & use for s, use in zip(self.space.shardings, shardings, strict=True)]
            )
            work, hop, chosen = self._work(its), self._hop(pp, its), list[tuple[Stages, Ints]]()
            for pipeline in self.space.pipelines(pp):
                if not plain or pipeline.chunks <= 2:
                    runs = np.flatnonzero(self.space.runs(pipeline, its))
                    its_work = work if len(runs) == len(its) else work.take(runs)
                    stages = self._stages(pipeline, its[runs], its_work, hop[runs])
                    quick = np.flatnonzero(stages.bound() < limit[runs]) if limited else np.arange(len(runs))
                    if len(quick):
                        chosen.append((stages if len(quick) == len(runs) else stages.take(quick), runs[quick]))
            if chosen:
                yield from self._sharded(chosen, its, legal)

    def _sharded(self, chosen: Sequence[tuple[Stages, Ints]], at: Ints, legal: Bools) -> Iterator[Bounds]:
        """Under each sharding that is `legal`, [shardings, n], for them: bounds of those of the combinations `at` that are `chosen` with
        each pipeline."""
        every = distinct(np.concatenate([its for _, its in chosen])).keys
        known = self.state.sharded([stages.shape.held for stages, _ in chosen], at, legal, every)
        for (stages, of), state in zip(chosen, known, strict=True):
            sharding, its = np.nonzero(taken(legal, of))
            prices, own = state.of(sharding, of[its]), at[of]
            seconds = self.seconds(stages, own, prices, its)
            bytes_ = (
                taken(stages.passing_bytes(self.tables.boundary[own]), its) + prices[:, BYTES] + self.estimator.overhead
            )
            nothing = np.zeros(len(its), dtype=np.int64)
            yield Bounds(self, stages.shape.pipeline, own[its], sharding, nothing, nothing, seconds, bytes_.max(axis=0))

    def seconds(self, stages: Stages, at: Ints, prices: Floats, its: Ints, given: _Given | None = None) -> Floats:
        """Of the step, for combinations `at` (their `its`, with repeats) whose state costs `prices`."""
        more = given or _Given()
        forward, backward = taken(stages.forward, its), taken(stages.backward, its) + more.backward
        forward_links, backward_links = taken(stages.forward_links, its), taken(stages.backward_links, its)
        gather = self._exposed(prices[:, FORWARD], forward, forward_links, more.forward_read)
        again = self._exposed(prices[:, BACKWARD], backward, backward_links, more.backward_read)
        reduction = self._exposed(prices[:, REDUCTION], backward + again, backward_links)
        seconds = stages.bound(its, forward + backward + gather + again, more.backward_ahead)
        if self.estimator.cluster.node.compute_slots is not None and self.space.gpus > 1:
            crowded = stages.shape.counts.sum(axis=0) @ self.tables.of("crowded", at)
            seconds = np.maximum(seconds, (crowded * stages.m)[its] / stages.shape.pipeline.pp)
        return np.asarray(seconds + (reduction + prices[:, REST] + more.update).max(axis=0))

    def relieve(self, bounds: Bounds, rows: Ints, below: float = float("inf")) -> Bounds:
        """Of `rows` of `bounds`, which have no relief: each with every relief that is legal for it, in as few layers as may fit, if it
        may be quicker than `below`."""
        limit, short = self.estimator.cluster.accelerator.memory_bytes, bounds.take(rows)
        if not len(rows):
            return short
        eased = self._eased(short)
        rows = np.flatnonzero(eased.least_bytes() <= limit)
        zero = self.zero[short.sharding[rows]]
        which = [
            rows[self.space.can_relieve(relief, short.at[rows], zero) & eased.host_may_hold(rows, number)]
            for number, relief in enumerate(self.space.reliefs[1:], start=1)
        ]
        its, relief = np.concatenate(which), np.repeat(1 + np.arange(len(which)), [len(each) for each in which])
        if not len(its):
            return short.take(its)
        eased.learn(rows, relief)
        some = np.flatnonzero(eased.seconds(its, relief, np.minimum(eased.all_layers(relief), 1)) < below)
        its, relief = its[some], relief[some]
        some, layers = eased.fewest_layers(its, relief, limit)
        found = eased.bounds(its[some], relief[some], layers[some])
        return found.take(np.flatnonzero(found.seconds < below))

    def recomputed(self, bounds: Bounds, relief: Relief = FULL) -> Bounds:
        """`bounds`, which have no relief, with recompute of all layers."""
        if not len(bounds.at):
            return bounds
        eased, its = self._eased(bounds), np.arange(len(bounds.at))
        again = np.full(len(its), self.space.reliefs.index(relief))
        eased.learn(its, again)
        return eased.bounds(its, again, eased.all_layers(again))

    def emptied(self, bounds: Bounds) -> Bounds:
        """The same with full recompute, and what is offloaded with which it needs least."""
        if not len(bounds.at):
            return bounds
        eased, its = self._eased(bounds), np.arange(len(bounds.at))
        eased.learn(its, np.full(len(its), self.space.reliefs.index(FULL)))
        relief, _ = eased.emptied()
        return eased.bounds(its, relief, eased.all_layers(relief))

    def _eased(self, bounds: Bounds) -> _Eased:
        hop = self._hop(bounds.pipeline.pp, bounds.at)
        stages = self._stages(bounds.pipeline, bounds.at, self._work(bounds.at), hop)
        return _Eased(self, stages, bounds, self.state.price(stages.shape.held, bounds.at, bounds.sharding))

    @cached_property
    def zero(self) -> Ints:
        """[shardings]"""
        return np.array([sharding.zero for sharding in self.space.shardings])

    def _work(self, at: Ints) -> Work:
        return Work(*(self.tables.of(name, at) for name in Work._fields))

    def _stages(self, pipeline: Pipeline, at: Ints, work: Work, hop: Floats) -> Stages:
        return Stages(self._shape(pipeline), work, self.space.micro_batches[at], hop)

    def _shape(self, pipeline: Pipeline) -> Shape:
        if pipeline not in self._shapes:
            self._shapes[pipeline] = Shape(pipeline, self._layers)
        return self._shapes[pipeline]

    def _hop(self, pp: int, at: Ints) -> Floats:
        """Seconds of a send between stages."""
        if pp == 1:
            return np.zeros(len(at))
        keys = self.space.strides["pp"][at] * 2**44 + self.tables.boundary[at].astype(np.int64)
        unique, _, which = distinct(keys)
        seconds = self.estimator.times.seconds
        each = [seconds(Collective("pp", "send", pp, *divmod(key, 2**44))) for key in unique.tolist()]
        return np.asarray(np.array(each)[which])

    def _exposed(self, sent: Floats, work: Floats, own: Floats, read: Floats | float = 0.0) -> Floats:
        """As the estimator has it: what communication, [stages, both links, n], adds to computation that it runs beside, which has its
        `own` on these links; `read`: seconds of what comes from the host meanwhile."""
        (inside, outside), (own_inside, own_outside) = (each.swapaxes(0, 1) for each in (sent, own))
        seconds = inside + outside
        if not self.estimator.times.hides:
            return np.asarray(seconds + read)
        seconds = np.maximum(seconds, read)
        busiest = np.maximum(np.maximum(inside + own_inside, outside + own_outside), seconds)
        left = np.maximum(0.0, busiest - work)
        left = np.minimum(seconds, left)
        return np.asarray(left + self.estimator.constants.beside * (seconds - left))


@dataclass(frozen=True)
class _Given:
    """What a relief adds to the seconds of stages, [kinds of stages, n]."""

    backward: Floats | float = 0.0
    backward_ahead: Floats | float = 0.0
    """Of the places before."""
    forward_read: Floats | float = 0.0
    """Of parameters, from the host."""
    backward_read: Floats | float = 0.0
    update: Floats | float = 0.0
    """What the optimizer waits for."""


class _Eased:
    """The layouts of `plain` bounds, whose state costs `prices`, under reliefs. Each method is asked for some of the layouts, `its` (with
    repeats), each with a `relief` and a number of `layers` of each chunk that run again."""

    def __init__(self, closed: ClosedForm, stages: Stages, plain: Bounds, prices: Floats):
        self.closed, self.stages, self.plain, self.prices = closed, stages, plain, prices
        self._figures = np.zeros((*closed.reliefs.shape, len(plain.at)))
        shape, space, at = stages.shape, closed.space, plain.at
        self._passing = Passing(stages, closed.tables.boundary[at], shape.outer_stages)
        self._kind = shape.kind[shape.outer_stages]
        self._started = [closed.tables.started(name, at)[:-2] for name in ("backward", "backward_host")]
        self._first = shape.first_layers[:, shape.places[shape.outer_stages], :-2]
        offloads = [relief.offload for relief in space.reliefs]
        self._offloads, self._all = np.array([x != "none" for x in offloads]), np.array([x == "all" for x in offloads])
        self._again = np.array([relief.recompute != "none" for relief in space.reliefs])
        offloading = Layout(dp=space.gpus, offload="optimizer", precision=space.precision)
        self._links = closed.estimator.overlap.links(offloading)
        self._host_room = host_room(closed.estimator.cluster, offloading)

    def learn(self, its: Ints, relief: Ints) -> None:
        """What these reliefs change in the layers of `its`."""
        self._figures[..., its] = self.closed.reliefs.of(self.closed.space, self.plain.at[its], relief)

    def emptied(self) -> tuple[Ints, Floats]:
        """Of each the relief with which it needs least, all layers run again whole, and the bytes. Small state that is offloaded may need
        more for its way than for its place."""
        space, at, every = self.closed.space, self.plain.at, np.arange(len(self.plain.at))
        zero, which = self.closed.zero[self.plain.sharding], np.full(len(at), space.reliefs.index(FULL))
        least = self._all_again(which)
        offloads: tuple[Offload, ...] = ("optimizer", "all") if space.offloads else ()
        for offload in offloads:
            relief = space.reliefs.index(replace(FULL, offload=offload))
            can = space.can_relieve(space.reliefs[relief], at, zero) & self.host_may_hold(every, relief)
            bytes_ = np.where(can, self._all_again(np.full(len(at), relief)), np.inf)
            which, least = np.where(bytes_ < least, relief, which), np.minimum(least, bytes_)
        return which, least

    def _all_again(self, relief: Ints) -> Floats:
        return np.asarray(self.bytes(np.arange(len(relief)), relief, self.all_layers(relief)).max(axis=0))

    def host_may_hold(self, its: Ints, relief: Ints | int) -> Bools:
        """Whether what is offloaded may fit there."""
        return np.asarray((self._away(its, relief) <= self._host_room).all(axis=0))

    def _away(self, its: Ints, relief: Ints | int) -> Floats:
        """[kinds of stages, n]: bytes of the state that are offloaded, at the least."""
        optimizer, parameters = (taken(self.prices[:, price], its) for price in (OPTIMIZER, COMING))
        return np.asarray(self._offloads[relief] * optimizer + self._all[relief] * parameters)

    def _in_turn(self, its: Ints, relief: Ints) -> Floats:
        """[kinds of stages, n]: bytes of the largest buckets' state that are here while they come and go, as `cost/offload.py` has them."""
        size = STATE_BYTES[self.closed.space.precision]
        each = self._offloads[relief] * IN_TURN * size.optimizer + self._all[relief] * (IN_TURN + AHEAD) * size.parameter
        return np.asarray(each * taken(self.prices[:, LARGEST], its))

    def least_bytes(self) -> Floats:
        """Of all with every relief there is, at the least: of each layer its input is left."""
        closed, at = self.closed, self.plain.at
        full = closed.reliefs.mode[closed.space.reliefs.index(FULL)]
        self._figures[full, :, 0] = closed.tables.of("saved", at)[:-2] - closed.tables.boundary[at]
        return self.emptied()[1]

    def bounds(self, its: Ints, relief: Ints, layers: Ints) -> Bounds:
        seconds, bytes_ = self.seconds(its, relief, layers), self.bytes(its, relief, layers).max(axis=0)
        at, sharding = self.plain.at[its], self.plain.sharding[its]
        return Bounds(self.closed, self.plain.pipeline, at, sharding, relief, layers, seconds, bytes_)

    def all_layers(self, relief: Ints) -> Ints:
        return self._again[relief] * (len(self._first) - 1)

    def fewest_layers(self, its: Ints, relief: Ints, limit: float) -> tuple[Ints, Ints]:
        """Which fit into `limit` bytes at all, and with how few layers."""
        least, most = np.minimum(self.all_layers(relief), 1), self.all_layers(relief)
        fits = (self.bytes(its, relief, most) <= limit).all(axis=0)
        while (open_ := np.flatnonzero(fits & (least < most))).size:
            middle = (least[open_] + most[open_]) // 2
            enough = (self.bytes(its[open_], relief[open_], middle) <= limit).all(axis=0)
            most[open_] = np.where(enough, middle, most[open_])
            least[open_] = np.where(enough, least[open_], middle + 1)
        return np.flatnonzero(fits), most

    def bytes(self, its: Ints, relief: Ints, layers: Ints) -> Floats:
        """[outer stages, n]"""
        freed = self._figures[self.closed.reliefs.mode[relief], :, 0, its]
        chunks = np.einsum("nscr,nr->scn", self._first[layers], freed)
        state = (taken(self.prices[:, BYTES], its) - self._away(its, relief) + self._in_turn(its, relief))[self._kind]
        return np.asarray(self._passing.bytes(its, chunks) + state + self.closed.estimator.overhead)

    def seconds(self, its: Ints, relief: Ints, layers: Ints) -> Floats:
        mode = self.closed.reliefs.mode[relief]
        # Of a pass that the host starts later than the device could run it, part of the wait may be what runs again.
        device, host = (taken(self._started[i], its) + self._figures[mode, :, 1 + i, its].T for i in range(2))
        each = np.maximum(device, host) - taken(np.maximum(*self._started), its)
        shape = self.stages.shape
        own, ahead = (np.einsum("nsr,rn->sn", of[layers][:, :, :-2], each) for of in (shape.first_work, shape.first_ahead))
        given = _Given(own, ahead, *self._offloading(its, relief)) if self._links.host else _Given(own, ahead)
        return self.closed.seconds(self.stages, self.plain.at, taken(self.prices, its), its, given)

    def _offloading(self, its: Ints, relief: Ints) -> tuple[Floats, Floats, Floats]:
        """Seconds of reading parameters for each pass, and what the update of all state waits for, at the least."""
        links, prices = self._links, taken(self.prices, its)
        assert links.host is not None
        kept, all_ = prices[:, OPTIMIZER] * self._offloads[relief], self._all[relief]
        written = kept + all_ * prices[:, COMING]
        moved = np.maximum(kept, written) if links.duplex else kept + written
        hides = self.closed.estimator.times.hides
        update = np.maximum(0.0, moved / links.host - prices[:, UPDATE] * hides) * self._offloads[relief]
        return all_ * prices[:, COMING] / links.host, all_ * prices[:, RETURNING] / links.host, update
