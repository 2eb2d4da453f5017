"""What the state of a stage costs (parameters, gradients, optimizer), for many ways to cut it at once.

Communication is priced in the fewest buckets that there can be: a lower bound of what `cost/` finds for the buckets as planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import CollectiveOp, Elementwise
from meshwright.planner.arrays import Bools, Distinct, Floats, Ints, distinct, taken
from meshwright.planner.collectives import CollectivePrices, Ranks
from meshwright.planner.space import Space
from meshwright.planner.tables import ShardSizes, Tables
from meshwright.schedule.buckets import bucket_bytes
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES

Held = tuple[int, ...]
"""How many of each kind of layer, of embeddings and of heads a stage holds; and then how many of each it surely uses at once, where each
comes while the one before is used."""

FORWARD, BACKWARD, REDUCTION = slice(0, 2), slice(2, 4), slice(4, 6)
REST, BYTES, UPDATE, OPTIMIZER, COMING, RETURNING, LARGEST = range(6, 13)
PRICES, PLAIN = 13, 8
"""Rows of a price, the first of which are all that a layout without relief asks: seconds gathering for forward, and for backward with
what is reduced there, of the gradients' reduction, each on the links of a domain and on the network; of what follows it; bytes. Then
seconds of the optimizer alone; of the bytes, those of its state, of parameters that come and go, and of those that do so again for
backward; elements of the largest bucket's part, at the least."""


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


class _Bunches(NamedTuple):
    """So many, of so many elements each, go together over the wire."""

    number: Ints
    """[bunches, stages, 1 or ways]"""
    each: Ints
    """[bunches, 1 or stages, ways]"""

    def add_up(self, each: Floats | Ints) -> Floats | Ints:
        """[stages, ways]: of so much each."""
        if self.number.shape[2] == each.shape[1] == 1:
            return np.asarray(self.number[:, :, 0].T @ each[:, 0])
        return np.asarray((self.number * each).sum(axis=0))


class _Sizes(NamedTuple):
    """Elements of the shards of a group; by split, of which there are so many columns."""

    rows: Ints
    """Which row of the tables each shard is of."""
    each: Ints
    """[shards, splits]"""
    together: Ints
    """[rows of the tables, splits]: all of a row's; so, too, the next."""
    largest: Ints


class Sharded(NamedTuple):
    """Prices of combinations under shardings."""

    known: Floats
    """[stages, prices, different ones]"""
    number: Ints
    """[shardings, combinations]: which of the different ones each is."""

    def of(self, sharding: Ints, row: Ints) -> Floats:
        """[stages, prices, n]"""
        return taken(self.known, self.number[sharding, row])


class StatePrices:
    """Of every combination of a space under each sharding; asked once for all that cut their state alike."""

    def __init__(self, space: Space, estimator: Estimator, tables: Tables):
        self.space, self.tables = space, tables
        self.collectives = CollectivePrices(estimator.times, space.gpus)
        self.size, self.domain = STATE_BYTES[space.precision], estimator.cluster.fabric.domain
        kernels = estimator.kernels(Layout(dp=space.gpus, precision=space.precision), shared=True)
        self.start = kernels.elementwise(Elementwise("optimizer", 0))
        self.per_byte = kernels.elementwise(Elementwise("optimizer", 1)) - self.start
        self._known: dict[Held, tuple[Ints, Floats]] = {}
        self._sizes: dict[_Group, _Sizes] = {}
        zero = [(sharding.zero, sharding.shard or 0) for sharding in space.shardings]
        self._zero, self._shard = np.array(zero, dtype=np.int64).T

    def price(self, helds: Sequence[Held], at: Ints, sharding: Ints) -> Floats:
        """[stages, prices, n] of stages that hold `helds`, for the combinations `at`, each with a sharding (an index of the space's)."""
        different = distinct(self._keys(at, sharding))
        return taken(self._of(helds, different, at, sharding), different.which)

    def sharded(self, pipelines: Sequence[Sequence[Held]], at: Ints, legal: Bools, rows: Ints) -> Iterator[Sharded]:
        """For each of the `pipelines` the `PLAIN` ones of combinations `at`; asked once, for all `rows` of them under every sharding that
        is `legal`, [shardings, n], for them."""
        sharding, of = np.nonzero(legal[:, rows])
        its = at[rows[of]]
        different = distinct(self._keys(its, sharding))
        number = np.zeros(legal.shape, dtype=np.int64)
        number[sharding, rows[of]] = different.which
        known = self._of([held for helds in pipelines for held in helds], different, its, sharding)
        for each in np.split(known, np.cumsum([len(helds) for helds in pipelines])[:-1]):
            yield Sharded(each[:, :PLAIN], number)

    def _keys(self, at: Ints, sharding: Ints) -> Ints:
        """Combinations with the same, each with its sharding, cut their state alike."""
        most, cp = self.space.gpus + 1, self.space.columns.cp
        keys = (self.tables.split[at] * len(self._zero) + sharding) * (int(cp.max()) + 1) + cp[at]
        keys = keys * most + self.space.dp[at]
        return keys * most + self.space.data_stride[at] if self.space.order.any() else keys

    def _of(self, helds: Sequence[Held], different: Distinct, at: Ints, sharding: Ints) -> Floats:
        """[stages, prices, keys]"""
        keys, first, _ = different
        self._learn(list(dict.fromkeys(helds)), keys, at[first], sharding[first])
        out = np.empty((len(helds), PRICES, len(keys)))
        for row, held in enumerate(helds):
            known, values = self._known[held]
            out[row] = taken(values, np.searchsorted(known, keys))
        return out

    def _learn(self, helds: Sequence[Held], keys: Ints, at: Ints, sharding: Ints) -> None:
        """Price what is not known yet of any of `helds`, all at once; `keys` (ascending) are of `at` and `sharding`."""
        lacking = [self._lacks(held, keys) for held in helds]
        new = np.flatnonzero(np.logical_or.reduce(lacking))
        if not len(new):
            return
        found = self._new(np.array(helds), at[new], sharding[new])
        for number, (held, lacks) in enumerate(zip(helds, lacking, strict=True)):
            its, (known, values) = lacks[new], self._known[held]
            known, values = np.concatenate((known, keys[new[its]])), np.hstack((values, found[:, number, its]))
            order = np.argsort(known)
            self._known[held] = known[order], taken(values, order)

    def _lacks(self, held: Held, keys: Ints) -> Bools:
        known, _ = self._known.setdefault(held, (np.empty(0, np.int64), np.empty((PRICES, 0))))
        if not len(known):
            return np.ones(len(keys), dtype=bool)
        return np.asarray(known[np.searchsorted(known, keys).clip(max=len(known) - 1)] != keys)

    def _new(self, helds: Ints, at: Ints, sharding: Ints) -> Floats:
        """[prices, stages, n]; `helds` is [stages, 2 * rows of the tables]."""
        out, zero, shard = np.empty((PRICES, len(helds), len(at))), self._zero[sharding], self._shard[sharding]
        for its in (np.flatnonzero(zero < 3), np.flatnonzero(zero == 3)):
            if len(its):
                out[:, :, its] = self._of_stages(helds, at[its], zero[its], shard[its])
        return out

    def _of_stages(self, helds: Ints, at: Ints, zero: Ints, shard: Ints) -> Floats:
        """The same, of those with ZeRO-3 alone or of those without."""
        held, at_once = np.split(helds.T[:, :, None], 2)
        shape, size, split = (len(helds), len(at)), self.size, self.tables.split[at]
        out = np.zeros((PRICES, *shape))
        owned_all, elements_all, buffer = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        units, gradients = np.zeros((len(held), *shape)), _UnitGradients(shape)
        scatters, ends = zero >= 2, np.concatenate((held[:-2], np.zeros_like(held[-2:])))
        for group in _groups(int(zero[0])):
            cuts, sizes = self._cuts(group, at, zero, shard), self._shards(group)
            rows = _Bunches(held, taken(sizes.together, split)[:, None])  # a layer, an embedding or a head at a time
            elements = _total(rows)
            if not elements.any():
                continue
            owned = elements // cuts.cuts
            owned_all, elements_all = owned_all + owned, elements_all + elements
            bunches = [rows] if group.comes_and_goes else self._buckets(rows, sizes, split, cuts.ranks)
            axis = "edp" if group.routed else "dp"
            within = self.collectives.ranks(axis, cuts.cuts, cuts.stride)
            gather = self._seconds(within, "all_gather", bunches, size.parameter)
            scatter = self._seconds(within, "reduce_scatter", bunches, size.gradient)
            shares = [_Bunches(number, each // cuts.cuts) for number, each in bunches]
            across = self.collectives.ranks(axis, cuts.ranks // cuts.cuts, cuts.stride * cuts.cuts)
            replicas = self._seconds(across, "all_reduce", shares, size.gradient)
            over = self._by_links(cuts.cuts, cuts.stride)
            if group.comes_and_goes:
                # The embedding and the head need not be gathered for backward.
                layers = _Bunches(ends, rows.each)
                whole_at_once = _Bunches((cuts.cuts > 1) * at_once, rows.each)
                units += whole_at_once.number * whole_at_once.each
                gradients.add(whole_at_once)
                out[FORWARD] += over * gather
                out[BACKWARD] += over * self._seconds(within, "all_gather", [layers], size.parameter)
            out[BACKWARD] += over * (scatters * scatter)
            whole = cuts.cuts == 1
            each = rows.each if group.comes_and_goes else taken(sizes.largest, split)[:, None]
            largest = ((held > 0) * each).max(axis=0)
            buffer = np.maximum(buffer, ~whole * largest)
            if group.comes_and_goes or zero[0] < 3:
                out[LARGEST] = np.maximum(out[LARGEST], largest // cuts.cuts)
            over_all = self._by_links(cuts.ranks, cuts.stride)
            out[REDUCTION] += np.where(whole, over_all * replicas, over * (~scatters * scatter))
            out[REST] += np.where(whole, 0.0, replicas + (0.0 if group.comes_and_goes else gather))
            parameters = owned if group.comes_and_goes else elements
            summed = np.where(scatters, owned, elements)
            out[BYTES] += parameters * size.parameter + summed * size.gradient + owned * size.optimizer
            out[OPTIMIZER] += owned * size.optimizer
            if group.comes_and_goes:
                out[COMING] += owned * size.parameter
                out[RETURNING] += _total(layers) // cuts.cuts * size.parameter
        out[BYTES] += units.max(axis=0) * size.parameter  # the largest, whole while they are used
        if size.gradient != size.parameter:  # a whole gradient goes through no parameters' buffer
            out[BYTES] += scatters * np.maximum(buffer, gradients.elements) * size.gradient
        # As `cost/program.py` has the optimizer, without padding.
        moved = (
            owned_all * (2 * (size.optimizer + size.parameter) + size.gradient)
            + (elements_all + 3 * owned_all) * size.gradient
        )
        out[UPDATE] = self.start + self.per_byte * moved
        out[REST] += out[UPDATE]
        return out

    def _by_links(self, size: Ints, stride: Ints) -> Ints:
        """[2, 1, n]: one where a domain holds groups of `size` ranks `stride` apart, and one where the network does (`Cluster.tier`)."""
        inside = size * stride <= self.domain
        return np.array([[inside], [~inside]], dtype=np.int64)

    def _cuts(self, group: _Group, at: Ints, zero: Ints, shard: Ints) -> _Cuts:
        columns = self.space.columns
        ranks, stride = self.space.dp[at] * columns.cp[at], self.space.data_stride[at]
        if group.routed:
            cut = columns.ep[at] * columns.etp[at]
            ranks, stride = ranks * columns.tp[at] // cut, cut
        within = np.gcd(shard, ranks) if group.routed else shard
        return _Cuts(ranks, np.where(zero == 0, 1, np.where(shard > 0, within, ranks)), stride)

    def _shards(self, group: _Group) -> _Sizes:
        if group not in self._sizes:
            by_split = [[group.sizes(of) for of in sizes] for sizes in self.tables.shards]
            rows = np.array([row for row, sizes in enumerate(by_split[0]) for _ in sizes], dtype=np.int64)
            each = np.array([[n for sizes in split for n in sizes] for split in by_split], dtype=np.int64)
            together, largest = (
                np.array([[made(sizes) for sizes in split] for split in by_split], dtype=np.int64).T
                for made in (sum, lambda sizes: max(sizes, default=0))
            )
            self._sizes[group] = _Sizes(rows, each.reshape(len(by_split), len(rows)).T, together, largest)
        return self._sizes[group]

    def _buckets(self, rows: _Bunches, sizes: _Sizes, split: Ints, ranks: Ints) -> list[_Bunches]:
        """The fewest: what is larger than a bucket goes alone, and the rest in full buckets."""
        groups, _, which = distinct(ranks)
        limit = np.array([bucket_bytes(n) for n in groups.tolist()])[which] // self.size.gradient
        large = np.flatnonzero(sizes.each.max(axis=1) > limit.min())
        each = taken(sizes.each[large], split)[:, None]
        alone = _Bunches(rows.number[sizes.rows[large]], each * (each > limit))
        full, rest = np.divmod(_total(rows) - _total(alone), limit)
        return [alone, _Bunches(full[None], limit[None, None]), _Bunches(np.ones_like(rest)[None], rest[None])]

    def _seconds(self, ranks: Ranks, op: CollectiveOp, bunches: Sequence[_Bunches], size: int) -> Floats:
        """[stages, n]: of a call for each bunch."""
        out = np.zeros((1, len(ranks.several)))
        if ranks.several.any():
            for bunch in bunches:
                if bunch.number.any() and bunch.each.any():
                    called = ranks.several & (bunch.each > 0)
                    out = out + bunch.add_up(called * self.collectives.seconds(ranks, op, bunch.each * size))
        return out


class _UnitGradients:
    """Whole gradients of units before they are reduced: buffers are kept for the next of the same size, so those of the layers that need
    most, and those of the larger end of the model, if they are of another size."""

    def __init__(self, shape: tuple[int, int]):
        self._layers, self._each, self._ends = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def add(self, units: _Bunches) -> None:
        """[rows of the tables, stages, n]: so many of a group are there at once."""
        every = units.number * units.each
        layers, ends = every[:-2], every[-2:].max(axis=0)
        most = layers.argmax(axis=0)[None]
        here, each = (np.take_along_axis(of, most, axis=0)[0] for of in (layers, np.broadcast_to(units.each, every.shape)))
        self._each = np.where(here > self._layers, each, self._each)
        self._layers, self._ends = np.maximum(self._layers, here), np.maximum(self._ends, ends)

    @property
    def elements(self) -> Floats:
        return np.asarray(self._layers + np.where(self._ends == self._each, 0, self._ends))


def _total(bunches: _Bunches) -> Ints:
    """[stages, ways]: elements of all."""
    return np.asarray(bunches.add_up(bunches.each), dtype=np.int64)
