"""What the state of a stage costs (parameters, gradients, optimizer), for many ways to cut it at once.

Communication is priced in the fewest buckets that there can be: a lower bound of what `cost/` finds for the buckets as planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.collectives import Curve
from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Collective, CollectiveOp, Elementwise
from meshwright.planner.arrays import Bools, Floats, Ints
from meshwright.planner.space import Space
from meshwright.planner.tables import ShardSizes, Tables
from meshwright.schedule.buckets import bucket_bytes
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES

Held = tuple[int, ...]
"""How many of each kind of layer, of embeddings and of heads a stage holds; and then how many of each it surely uses at once, where each
comes while the one before is used."""

FORWARD, BACKWARD, REDUCTION = slice(0, 2), slice(2, 4), slice(4, 6)
REST, BYTES, UPDATE, OPTIMIZER, COMING, RETURNING = range(6, 12)
PRICES = 12
"""Rows of a price: seconds gathering for forward, and for backward with what is reduced there, of the gradients' reduction, each on the
links of a domain and on the network; of what follows it; bytes; seconds of the optimizer alone; of the bytes, those of its state, of
parameters that come and go, and of those that do so again for backward."""


FREE = Curve(((0.0, 0.0),))
"""Of a single rank."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters that share buckets."""

    fields: tuple[str, ...]
    routed: bool = False
    comes_and_goes: bool = False
    """ZeRO-3's: gathered layer by layer."""

    def sizes(self, of: ShardSizes) -> tuple[int, ...]:
        return tuple(n for name in self.fields for n in getattr(of, name))


def _groups(zero: int) -> tuple[_Group, ...]:
    if zero < 3:
        return _Group(("matrices", "routers")), _Group(("vectors",)), _Group(("experts", "expert_vectors"), routed=True)
    return (
        _Group(("matrices",), comes_and_goes=True),
        _Group(("routers", "vectors")),
        _Group(("experts",), routed=True, comes_and_goes=True),
        _Group(("expert_vectors",), routed=True),
    )


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The ranks that hold the same parameters, and into how many parts their state is cut; arrays of one entry for each way."""

    ranks: Ints
    cuts: Ints
    stride: Ints


@dataclass(frozen=True, slots=True)
class _Bunches:
    """[bunches, ways]: so many, of so many elements each, go together over the wire."""

    count: Ints
    each: Ints


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Groups of ranks on an axis, of each way one of these `groups`: (size, stride)."""

    axis: str
    groups: list[tuple[int, int]]
    which: Ints
    several: Bools
    """Whether there is more than one rank."""


class StatePrices:
    """Of every combination of a space under each sharding; asked once for all that cut their state alike."""

    def __init__(self, space: Space, estimator: Estimator, tables: Tables):
        self.space, self.times, self.tables = space, estimator.times, tables
        self.size, self.domain = STATE_BYTES[space.precision], estimator.cluster.fabric.domain
        kernels = estimator.kernels(Layout(dp=space.gpus, precision=space.precision), shared=True)
        self.start = kernels.elementwise(Elementwise("optimizer", 0))
        self.per_byte = kernels.elementwise(Elementwise("optimizer", 1)) - self.start
        self._known: dict[Held, tuple[Ints, Floats]] = {}
        self._sizes: dict[_Group, tuple[Ints, Ints]] = {}
        self._curves: dict[tuple[str, CollectiveOp, int, int], Curve | None] = {}
        zero = [(sharding.zero, sharding.shard or 0) for sharding in space.shardings]
        self._zero, self._shard = np.array(zero, dtype=np.int64).T

    def price(self, helds: Sequence[Held], at: Ints, sharding: Ints) -> Floats:
        """[stages, prices, n] of stages that hold `helds`, for the combinations `at`, each with a sharding (an index of the space's)."""
        columns, most = self.space.columns, self.space.gpus + 1
        keys = ((self.tables.split[at] * len(self._zero) + sharding) * most + columns.cp[at]) * most + self.space.dp[at]
        if self.space.order.any():
            keys = keys * most + self.space.data_stride[at]
        unique, first, which = np.unique(keys, return_index=True, return_inverse=True)
        self._learn(helds, unique, at[first], sharding[first])
        out = np.empty((len(helds), PRICES, len(at)))
        for row, held in enumerate(helds):
            known, values = self._known[held]
            out[row] = values[:, np.asarray(np.searchsorted(known, unique))[which]]
        return out

    def _learn(self, helds: Sequence[Held], keys: Ints, at: Ints, sharding: Ints) -> None:
        """Price what is not known yet of any of `helds`, all at once; `keys` (ascending) are of `at` and `sharding`."""
        none = np.empty(0, np.int64), np.empty((PRICES, 0))
        new = [np.flatnonzero(~np.isin(keys, self._known.get(held, none)[0], assume_unique=True)) for held in helds]
        counts = [len(its) for its in new]
        if not any(counts):
            for held in helds:
                self._known.setdefault(held, none)
            return
        every = np.concatenate(new)
        found = self._new(np.repeat(np.array(helds).T, counts, axis=1), at[every], sharding[every])
        for held, its, values in zip(helds, new, np.split(found, np.cumsum(counts)[:-1], axis=1), strict=True):
            known, before = self._known.get(held, none)
            known, values = np.concatenate((known, keys[its])), np.hstack((before, values))
            order = np.argsort(known)
            self._known[held] = known[order], values[:, order]

    def _new(self, held: Ints, at: Ints, sharding: Ints) -> Floats:
        """[prices, n]; `held` is [2 * rows of the tables, n]."""
        out, zero, shard = np.empty((PRICES, len(at))), self._zero[sharding], self._shard[sharding]
        for its in (np.flatnonzero(zero < 3), np.flatnonzero(zero == 3)):
            if len(its):
                out[:, its] = self._of_stages(held[:, its], at[its], zero[its], shard[its])
        return out

    def _of_stages(self, held: Ints, at: Ints, zero: Ints, shard: Ints) -> Floats:
        """The same, of those with ZeRO-3 alone or of those without."""
        (held, at_once), size, out = np.split(held, 2), self.size, np.zeros((PRICES, len(at)))
        owned_all, elements_all, buffer = np.zeros(len(at)), np.zeros(len(at)), np.zeros(len(at))
        units = np.zeros(held.shape)
        scatters, ends = zero >= 2, np.vstack((held[:-2], np.zeros_like(held[-2:])))
        for group in _groups(int(zero[0])):
            cuts, (rows, table) = self._cuts(group, at, zero, shard), self._shards(group)
            count, each = held[rows], table[:, self.tables.split[at]]
            elements = (count * each).sum(axis=0)
            if not elements.any():
                continue
            owned = elements // cuts.cuts
            owned_all, elements_all = owned_all + owned, elements_all + elements
            bunches = _by_row(held, rows, each) if group.comes_and_goes else self._buckets(count, each, cuts.ranks)
            axis = "edp" if group.routed else "dp"
            within = self._ranks(axis, cuts.cuts, cuts.stride)
            gather = self._seconds(within, "all_gather", bunches, size.parameter)
            scatter = self._seconds(within, "reduce_scatter", bunches, size.gradient)
            shares = _Bunches(bunches.count, bunches.each // cuts.cuts)
            across = self._ranks(axis, cuts.ranks // cuts.cuts, cuts.stride * cuts.cuts)
            replicas = self._seconds(across, "all_reduce", shares, size.gradient)
            over = self._by_links(cuts.cuts, cuts.stride)
            if group.comes_and_goes:
                # The embedding and the head need not be gathered for backward.
                layers = _by_row(ends, rows, each)
                units += (cuts.cuts > 1) * at_once * bunches.each
                out[FORWARD] += over * gather
                out[BACKWARD] += over * self._seconds(within, "all_gather", layers, size.parameter)
            out[BACKWARD] += over * (scatters * scatter)
            whole = cuts.cuts == 1
            alone = bunches.count * bunches.each > 0 if group.comes_and_goes else count * each > 0
            largest = (alone * (bunches.each if group.comes_and_goes else each)).max(axis=0)
            buffer = np.maximum(buffer, ~whole * largest)
            over_all = self._by_links(cuts.ranks, cuts.stride)
            out[REDUCTION] += np.where(whole, over_all * replicas, over * (~scatters * scatter))
            out[REST] += np.where(whole, 0.0, replicas + (0.0 if group.comes_and_goes else gather))
            parameters = owned if group.comes_and_goes else elements
            gradients = np.where(scatters, owned, elements)
            out[BYTES] += parameters * size.parameter + gradients * size.gradient + owned * size.optimizer
            out[OPTIMIZER] += owned * size.optimizer
            if group.comes_and_goes:
                out[COMING] += owned * size.parameter
                out[RETURNING] += (ends[rows] * each).sum(axis=0) // cuts.cuts * size.parameter
        out[BYTES] += units.max(axis=0) * size.parameter  # the largest, whole while they are used
        if size.gradient != size.parameter:  # a whole gradient goes through no parameters' buffer
            out[BYTES] += scatters * buffer * size.gradient
        # As `cost/program.py` has the optimizer, without padding.
        moved = (
            owned_all * (2 * (size.optimizer + size.parameter) + size.gradient)
            + (elements_all + 3 * owned_all) * size.gradient
        )
        out[UPDATE] = self.start + self.per_byte * moved
        out[REST] += out[UPDATE]
        return out

    def _by_links(self, size: Ints, stride: Ints) -> Ints:
        """[2, n]: one where a domain holds groups of `size` ranks `stride` apart, and one where the network does (`Cluster.tier`)."""
        inside = size * stride <= self.domain
        return np.array([inside, ~inside], dtype=np.int64)

    def _cuts(self, group: _Group, at: Ints, zero: Ints, shard: Ints) -> _Cuts:
        columns = self.space.columns
        ranks, stride = self.space.dp[at] * columns.cp[at], self.space.data_stride[at]
        if group.routed:
            cut = columns.ep[at] * columns.etp[at]
            ranks, stride = ranks * columns.tp[at] // cut, cut
        within = np.gcd(shard, ranks) if group.routed else shard
        return _Cuts(ranks, np.where(zero == 0, 1, np.where(shard > 0, within, ranks)), stride)

    def _shards(self, group: _Group) -> tuple[Ints, Ints]:
        """Which row of the tables each shard is of; [shards, splits] its elements."""
        if group not in self._sizes:
            by_split = [[group.sizes(of) for of in sizes] for sizes in self.tables.shards]
            rows = [row for row, sizes in enumerate(by_split[0]) for _ in sizes]
            table = np.array([[n for sizes in split for n in sizes] for split in by_split], dtype=np.int64)
            self._sizes[group] = np.array(rows, dtype=np.int64), table.reshape(len(by_split), len(rows)).T
        return self._sizes[group]

    def _buckets(self, count: Ints, each: Ints, ranks: Ints) -> _Bunches:
        """The fewest: what is larger than a bucket goes alone, and the rest in full buckets."""
        limit = np.array([bucket_bytes(n) for n in ranks.tolist()]) // self.size.gradient
        alone = each > limit
        full, rest = np.divmod((count * each * ~alone).sum(axis=0), limit)
        return _Bunches(np.vstack((count * alone, full, np.ones_like(full))), np.vstack((each, limit, rest)))

    def _ranks(self, axis: str, size: Ints, stride: Ints) -> _Ranks:
        unique, which = np.unique(size * (self.space.gpus + 1) + stride, return_inverse=True)
        return _Ranks(axis, [divmod(one, self.space.gpus + 1) for one in unique.tolist()], which, size > 1)

    def _seconds(self, ranks: _Ranks, op: CollectiveOp, bunches: _Bunches, size: int) -> Floats:
        """Of a call for each bunch."""
        called: Bools = ranks.several & (bunches.count > 0) & (bunches.each > 0)
        if not called.any():
            return np.zeros(len(ranks.several))
        return np.asarray((called * bunches.count * self._price(ranks, op, bunches.each * size)).sum(axis=0))

    def _price(self, ranks: _Ranks, op: CollectiveOp, nbytes: Ints) -> Floats:
        """[bunches, ways]: seconds of one call of so many bytes."""
        curves = [self._curve(ranks.axis, op, *group) for group in ranks.groups]
        if None in curves:
            return self._measured([Collective(ranks.axis, op, *group, 0) for group in ranks.groups], ranks.which, nbytes)
        lines = [curve.lines for curve in curves if curve]
        most = max(map(len, lines))
        table = np.array([its + its[:1] * (most - len(its)) for its in lines])[ranks.which]
        floor = np.array([curve.floor for curve in curves if curve])[ranks.which]
        quickest = np.minimum.reduce([table[:, i, 0] + table[:, i, 1] * nbytes for i in range(most)])
        return np.asarray(np.maximum(floor, quickest))

    def _curve(self, axis: str, op: CollectiveOp, size: int, stride: int) -> Curve | None:
        key = axis, op, size, stride
        if key not in self._curves:
            self._curves[key] = self.times.curve(Collective(*key, 0)) if size > 1 else FREE
        return self._curves[key]

    def _measured(self, kinds: Sequence[Collective], which: Ints, nbytes: Ints) -> Floats:
        """Between measured points there is no line to draw for many at once."""
        seconds = [
            [
                self.times.seconds(kinds[i]._replace(bytes=n)) if kinds[i].group_size > 1 else 0.0
                for i, n in zip(which, row, strict=True)
            ]
            for row in nbytes.tolist()
        ]
        return np.array(seconds)


def _by_row(held: Ints, rows: Ints, each: Ints) -> _Bunches:
    """A layer, an embedding or a head at a time."""
    together = np.zeros_like(held)
    np.add.at(together, rows, each)
    return _Bunches(held, together)
