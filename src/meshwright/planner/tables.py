"""What the layers, experts and state of every combination of a space cost: arrays of the figures that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from meshwright.planner.arrays import Floats, Ints, taken
from meshwright.planner.figures import Figures, LayerFigures
from meshwright.planner.space import Space
from meshwright.spec.shards import Seat, Shard, Split, chunk_shards

K = TypeVar("K")


Kind = tuple[int | None, bool]
"""(attention window, whether the layer has experts)."""


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """Elements of the shards of one layer, of the embedding or of the head, by what they share buckets with."""

    matrices: tuple[int, ...]
    routers: tuple[int, ...]
    vectors: tuple[int, ...]
    """Of the dense parameters. ZeRO-3 leaves routers and vectors whole."""
    experts: tuple[int, ...]
    expert_vectors: tuple[int, ...]


@dataclass(frozen=True)
class Tables:
    """What the rows (each kind of layer, then the embedding and the head) cost in each combination of a space."""

    kinds: tuple[Kind, ...]
    dense: dict[str, Floats]
    """By figure, [kinds + 2, local choices]: without what experts cost more."""
    experts: dict[str, Floats]
    """By figure, [choices of experts]: that, of one layer. Empty for a model without experts."""
    local: Ints
    """Which local choice a combination has; so, too, the next."""
    choice: Ints
    boundary: Floats
    """Bytes of one hidden state that a stage sends, of each combination."""
    shards: tuple[tuple[ShardSizes, ...], ...]
    """[splits][kinds + 2]: what a rank holds of each of these."""
    split: Ints
    """Which way to cut parameters a combination has."""

    def of(self, figure: str, at: Ints) -> Floats:
        """[kinds + 2, n]: a figure of the combinations `at`."""
        out = self.started(figure, at)
        if figure in ("forward", "backward"):
            return np.maximum(out, self.started(f"{figure}_host", at))
        return out

    def started(self, figure: str, at: Ints) -> Floats:
        """The same, as if a pass could last less than the host takes to start it."""
        out = taken(self.dense[figure], self.local[at])
        if self.experts:
            out[self._sparse] += self.experts[figure][self.choice[at]]
        return out

    def total(self, figures: Sequence[str], counts: Floats) -> Floats:
        """Of every combination: the sum of these figures, of so many of each row."""
        out: Floats = (counts @ sum(self.dense[figure] for figure in figures))[self.local]
        if self.experts:
            out += (counts[self._sparse].sum() * sum(self.experts[figure] for figure in figures))[self.choice]
        return out

    def elements(self, counts: Floats) -> tuple[Floats, Floats]:
        """Of every combination: parameters of a rank that held so many of each row; dense ones, and experts'."""
        dense, routed = (
            np.array([[sum(sum(getattr(of, name)) for name in names) for of in sizes] for sizes in self.shards]) @ counts
            for names in (("matrices", "routers", "vectors"), ("experts", "expert_vectors"))
        )
        return dense[self.split], routed[self.split]

    @cached_property
    def _sparse(self) -> list[int]:
        return [row for row, (_, moe) in enumerate(self.kinds) if moe]


def make_tables(space: Space, figures: LayerFigures) -> Tables:
    """Prices of every combination. The prices of experts do not depend on how attention is cut, nor those of attention on how experts
    are: each is added up where it is asked for."""
    kinds = kinds_of(space)
    windows, window_of = _numbered([window for window, _ in kinds])
    every: list[list[Figures]] = []
    boundary, working = np.empty(len(space.locals)), np.empty(len(space.locals))
    for at, one in enumerate(space.locals):
        rows = figures.layers(one, windows)
        every.append([*(rows[at] for at in window_of), *figures.ends(one)])
        boundary[at], working[at] = figures.boundary(one), figures.working(one)
    dense = dict(zip(Figures._fields, np.array(every).transpose(2, 1, 0), strict=True))
    experts, choice = dict[str, Floats](), np.empty(0, np.int64)
    if space.model.experts is not None:
        experts, choice = _experts(space, figures, kinds, dense, working)
    return Tables(kinds, dense, experts, space.local, choice, boundary[space.local], *_shards(space, kinds))


def kinds_of(space: Space) -> tuple[Kind, ...]:
    """Of layers, in the order of the model."""
    model = space.model
    return tuple(dict.fromkeys((model.window(i), model.is_moe(i)) for i in range(model.layers)))


def _experts(
    space: Space, figures: LayerFigures, kinds: Sequence[Kind], dense: dict[str, Floats], working: Floats
) -> tuple[dict[str, Floats], Ints]:
    """What routed experts cost, for each choice of them and each number of tokens on a rank; and which choice each combination has.

    The kinds of `dense` that have experts lose a plain MLP for them, and get what else comes with experts. `working`: of a layer with
    such an MLP.
    """
    tokens = [figures.tokens(x) for x in space.locals]
    others, other = _numbered([(T, x.tp, x.sp, x.order) for T, x in zip(tokens, space.locals, strict=True)])
    changes = _by_figure([figures.beside_experts(*key) for key in others])
    for row in [row for row, (_, moe) in enumerate(kinds) if moe]:
        for figure, change in changes.items():
            dense[figure][row] += change[other]
        dense["working"][row] -= working
    sizes, size = _numbered([T // x.tp for T, x in zip(tokens, space.locals, strict=True)])
    keys = size[space.local] * len(space.experts) + space.expert
    used = np.flatnonzero(np.bincount(keys))
    choice = np.zeros(int(used[-1]) + 1, dtype=np.int64)
    choice[used] = np.arange(len(used))
    pairs = (divmod(key, len(space.experts)) for key in used.tolist())
    return _by_figure([figures.experts(sizes[at], *space.experts[cut]) for at, cut in pairs]), choice[keys]


def _by_figure(every: Sequence[Figures]) -> dict[str, Floats]:
    return dict(zip(Figures._fields, np.array(every).T, strict=True))


def _numbered(keys: Sequence[K]) -> tuple[list[K], Ints]:
    """The different keys in order, and which of them each one is."""
    ids = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return list(ids), np.array([ids[key] for key in keys], dtype=np.int64)


def _shards(space: Space, kinds: Sequence[Kind]) -> tuple[tuple[tuple[ShardSizes, ...], ...], Ints]:
    """What the first rank holds of each kind of layer, of the embedding and of the head, for each split; which split each
    combination has."""
    model = space.model
    first = [next(i for i in range(model.layers) if (model.window(i), model.is_moe(i)) == kind) for kind in kinds]
    ids, of_local = _numbered([x.tp for x in space.locals])

    def sizes(split: Split) -> list[ShardSizes]:
        parts = [chunk_shards(model, split, Seat(), range(i, i + 1), False, False) for i in first]
        parts += [chunk_shards(model, split, Seat(), range(0), at == 0, at == 1) for at in range(2)]
        return [_sizes(shards) for shards in parts]

    # Experts are not cut by tp, nor the rest by what cuts experts.
    dense, routed = [sizes(Split(tp)) for tp in ids], [sizes(Split(ep=ep, etp=etp)) for ep, etp in space.experts]
    out = tuple(
        tuple(
            replace(one, experts=its.experts, expert_vectors=its.expert_vectors) for one, its in zip(rows, own, strict=True)
        )
        for rows in dense
        for own in routed
    )
    return out, of_local[space.local] * len(space.experts) + space.expert


def _sizes(shards: Sequence[Shard]) -> ShardSizes:
    def of(routed: bool, decay: bool, gathered: bool) -> tuple[int, ...]:
        return tuple(s.numel for s in shards if (s.routed, s.decay, s.gathered) == (routed, decay, gathered))

    return ShardSizes(
        matrices=of(False, True, True),
        routers=of(False, True, False),
        vectors=of(False, False, False),
        experts=of(True, True, True),
        expert_vectors=of(True, False, False),
    )
