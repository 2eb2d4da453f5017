"""What layers, experts and state cost on a rank, for every local choice of a space: the estimator's own prices, each asked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import add
from typing import NamedTuple, TypeVar

import numpy as np

from meshwright.cost.attention import attention_core
from meshwright.cost.estimate import Estimator
from meshwright.cost.experts import expert_outputs, routed, shared_expert
from meshwright.cost.ops import PART, Op, Piece
from meshwright.cost.parts import Part, Shapes, gated_mlp
from meshwright.cost.peak import put_off_bytes
from meshwright.cost.pieces import coreless_layer_piece, embedding_piece, head_piece
from meshwright.planner.space import Bools, Floats, Ints, Local, Space
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.shards import Seat, Shard, Split, chunk_shards

K = TypeVar("K")


class Figures(NamedTuple):
    """Of a layer, of the embedding or of the head, for one micro-batch."""

    forward: float
    """Seconds."""
    backward: float
    weight: float
    """Of the backward, what makes the weight gradients."""
    crowded: float
    """Seconds of both passes while every rank of the node computes."""
    saved: float = 0.0
    """Bytes kept for backward."""
    put_off: float = 0.0
    """Bytes that the weights' half of a split backward needs."""
    forward_scale_up: float = 0.0
    """Seconds in which the links of a domain carry its communication in the forward; so, too, the next three."""
    forward_network: float = 0.0
    backward_scale_up: float = 0.0
    backward_network: float = 0.0
    forward_host: float = 0.0
    """Seconds that the host takes to start its operators, at the least; a pass lasts no less."""
    backward_host: float = 0.0
    working: float = 0.0
    """Bytes of the largest temporary."""


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
        out: Floats = self.dense[figure][:, self.local[at]]
        if self.experts:
            out[self._sparse] += self.experts[figure][self.choice[at]]
        if figure in ("forward", "backward"):
            return np.maximum(out, self.of(f"{figure}_host", at))
        return out

    def seconds(self, counts: Floats) -> Floats:
        """Of every combination: both passes of one micro-batch through so many of each row."""
        out: Floats = (counts @ (self.dense["forward"] + self.dense["backward"]))[self.local]
        if self.experts:
            out += (counts[self._sparse].sum() * (self.experts["forward"] + self.experts["backward"]))[self.choice]
        return out

    @cached_property
    def _sparse(self) -> list[int]:
        return [row for row, (_, moe) in enumerate(self.kinds) if moe]


def make_tables(space: Space, estimator: Estimator) -> Tables:
    """Prices of every combination. The prices of experts do not depend on how attention is cut, nor those of attention on how experts
    are: each is asked once, and added up where it is asked for."""
    model = space.model
    layers = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
    kinds = tuple(dict.fromkeys(layers))
    windows, window_of = _numbered([window for window, _ in kinds])
    figures: list[list[Figures]] = []
    boundary, working = np.empty(len(space.locals)), np.empty(len(space.locals))
    known = _DenseFigures(space, estimator)
    for at, one in enumerate(space.locals):
        rows = known.layers(one, windows)
        figures.append([*(rows[at] for at in window_of), *known.ends(one)])
        boundary[at], working[at] = known.boundary(one), known.working(one)
    dense = dict(zip(Figures._fields, np.array(figures).transpose(2, 1, 0), strict=True))
    experts, choice = dict[str, Floats](), np.empty(0, np.int64)
    if model.experts is not None:
        experts, choice = _experts(space, estimator, kinds, dense, working)
    return Tables(kinds, dense, experts, space.local, choice, boundary[space.local], *_shards(space, kinds))


class _DenseFigures:
    """Of layers without experts and of both ends of the model, each asked once: attention itself does not depend on how norms are cut,
    nor the rest of a layer on how its tokens are cut into sequences."""

    def __init__(self, space: Space, estimator: Estimator):
        self.space, self.estimator = space, estimator
        self.model, self.seq = space.model, space.workload.seq
        self._rest: dict[tuple[int, bool, int, bool], Figures] = {}
        self._cores: dict[tuple[object, ...], Figures] = {}
        self._heads: dict[tuple[int, bool, int], Figures] = {}
        self._embeddings: dict[tuple[int, bool, int, int], Figures] = {}

    def layers(self, one: Local, windows: Sequence[int | None]) -> list[Figures]:
        """Of a layer with each window."""
        rest = self._rest_of(one)
        return [Figures(*map(add, rest, self._core(one, window))) for window in windows]

    def working(self, one: Local) -> float:
        """Of such a layer that recomputes nothing; `layers` has been asked before."""
        return self._rest[one.tp, one.sp, self._tokens(one), False].working

    def boundary(self, one: Local) -> int:
        """Bytes of one hidden state that a stage sends."""
        own = self._tokens(one) // one.tp if one.sp else self._tokens(one)
        return own * self.model.hidden * STATE_BYTES[self.space.precision].parameter

    def ends(self, one: Local) -> tuple[Figures, Figures]:
        """Of the embedding and of the head."""
        tokens = self._tokens(one)
        head, embedding = (one.tp, one.sp, tokens), (one.tp, one.sp, tokens, 1 if self.model.rope else one.cp)
        if head not in self._heads:
            layout = self._layout(one)
            self._heads[head] = _figures(self.estimator, head_piece(self.model, layout, self.seq, 0), layout)
        if embedding not in self._embeddings:
            layout = self._layout(one)
            self._embeddings[embedding] = _figures(self.estimator, embedding_piece(self.model, layout, self.seq), layout)
        return self._embeddings[embedding], self._heads[head]

    def _tokens(self, one: Local) -> int:
        return one.micro_batch * self.seq // one.cp

    def _layout(self, one: Local) -> Layout:
        return one.layout(self.space.gpus, self.space.precision)

    def _rest_of(self, one: Local) -> Figures:
        """Of a layer without its attention core."""
        plain, full = ((one.tp, one.sp, self._tokens(one), again) for again in (False, True))
        if plain not in self._rest:
            layout = self._layout(replace(one, recompute="none"))
            piece = coreless_layer_piece(self.model, layout, self.seq)
            self._rest[plain] = _figures(self.estimator, piece, layout)
        if one.recompute != "full":  # selective: the core alone
            return self._rest[plain]
        if full not in self._rest:
            layout = self._layout(one)
            piece = coreless_layer_piece(self.model, layout, self.seq)
            again = _figures(self.estimator, Piece(PART, piece.recomputed, (), 0), layout)
            found = self._rest[plain]
            self._rest[full] = found._replace(
                backward=found.backward + again.forward,
                crowded=found.crowded + again.crowded,
                saved=piece.saved_bytes,
                backward_scale_up=found.backward_scale_up + again.forward_scale_up,
                backward_network=found.backward_network + again.forward_network,
                backward_host=found.backward_host + again.forward_host,
                working=piece.working_bytes,
            )
        return self._rest[full]

    def _core(self, one: Local, window: int | None) -> Figures:
        key = (one.tp, one.cp, one.ulysses, one.micro_batch, one.recompute, window)
        if key not in self._cores:
            layout = self._layout(one)
            part = attention_core(Shapes(self.model, layout, self.seq), window)
            full = one.recompute == "full"
            piece = Piece(PART, part.forward, (*part.forward * full, *part.backward), 0 if full else part.saved)
            found = _figures(self.estimator, piece, layout)
            self._cores[key] = found._replace(working=part.saved) if full else found
        return self._cores[key]


def _figures(estimator: Estimator, piece: Piece, layout: Layout) -> Figures:
    if piece.name != PART:
        piece = replace(piece, name=PART)
    alone, crowded = estimator.pieces.of(piece, layout, shared=False), 0.0
    if estimator.cluster.node.compute_slots is not None:
        busy = estimator.pieces.of(piece, layout, shared=True)
        crowded = busy.forward + busy.backward
    working = max(piece.working_bytes, piece.loss_bytes)
    put_off = put_off_bytes(piece, STATE_BYTES[layout.precision].parameter)
    dispatch = estimator.kernels(layout, shared=False).dispatch
    return Figures(
        alone.forward,
        alone.backward,
        alone.weight,
        crowded,
        piece.saved_bytes,
        put_off,
        *alone.forward_links,
        *alone.backward_links,
        dispatch * alone.forward_launches,
        dispatch * alone.backward_launches,
        working,
    )


def _experts(
    space: Space, estimator: Estimator, kinds: Sequence[Kind], dense: dict[str, Floats], working: Floats
) -> tuple[dict[str, Floats], Ints]:
    """What routed experts cost, for each choice of them and each number of tokens on a rank; and which choice each combination has.

    The kinds of `dense` that have experts lose a plain MLP for them, and get what else comes with experts. `working`: of a layer with
    such an MLP that recomputes nothing.
    """
    model, seq = space.model, space.workload.seq
    assert model.experts is not None
    shape = model.experts

    def beside(tokens: int, tp: int, sp: bool) -> Floats:
        """What else changes where an MLP gives way to experts."""
        layout = Local(tp, sp, 1, 1, 1, "none").layout(space.gpus, space.precision)
        shapes = Shapes(model, layout, tokens)
        shared, outputs, mlp = (
            shared_expert(shapes, shape),
            expert_outputs(shapes, shape),
            gated_mlp(shapes, "mlp", model.ffn // tp),
        )
        figures = [_part_figures(estimator, part, layout) for part in (shared, outputs, mlp)]
        more: Floats = figures[0] + figures[1] - figures[2]
        more[-2:] = 0.0, figures[0][-1] - figures[2][0]
        return more

    def each(u: int, expert: int) -> Floats:
        layout = Local(1, False, 1, 1, 1, "none").layout(space.gpus, space.precision, *space.experts[expert])
        part = routed(Shapes(model, layout, u, space.workload.expert_imbalance), shape)
        # Where nothing comes after it that must run again, neither must the last of it.
        return _part_figures(estimator, part, layout, part.forward if shape.shared_ffn else part.forward[:-1])

    tokens = [x.micro_batch * seq // x.cp for x in space.locals]
    full = np.array([x.recompute == "full" for x in space.locals])
    others, other = _numbered([(T, x.tp, x.sp) for T, x in zip(tokens, space.locals, strict=True)])
    changes = _as_recomputed(np.array([beside(*key) for key in others]).T[:, other], full)
    changes["working"] -= working
    for row in [row for row, (_, moe) in enumerate(kinds) if moe]:
        for figure, change in changes.items():
            dense[figure][row] += change
    sizes, size = _numbered([T // x.tp for T, x in zip(tokens, space.locals, strict=True)])
    keys = (full * len(sizes) + size)[space.local] * len(space.experts) + space.expert
    used = np.flatnonzero(np.bincount(keys))
    choice = np.zeros(int(used[-1]) + 1, dtype=np.int64)
    choice[used] = np.arange(len(used))
    pairs, which = np.unique(used % (len(sizes) * len(space.experts)), return_inverse=True)
    values = np.array(
        [each(sizes[at], expert) for at, expert in (divmod(pair, len(space.experts)) for pair in pairs.tolist())]
    )
    recomputed = used >= len(sizes) * len(space.experts)
    return _as_recomputed(values.T[:, which], recomputed), choice[keys]


def _as_recomputed(figures: Floats, full: Bools) -> dict[str, Floats]:
    """What the parts with these `figures` (and `again`) cost a layer; `full`: one that runs them again."""
    out = dict(zip(Figures._fields, figures[:-1], strict=True))
    saved, again = out["saved"], figures[-1]
    return out | {
        "backward": out["backward"] + full * again,
        "saved": ~full * saved,
        "working": full * saved + out["working"],
    }


def _numbered(keys: Sequence[K]) -> tuple[list[K], Ints]:
    """The different keys in order, and which of them each one is."""
    ids = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return list(ids), np.array([ids[key] for key in keys], dtype=np.int64)


def _part_figures(estimator: Estimator, part: Part, layout: Layout, repeated: Sequence[Op] | None = None) -> Floats:
    """The figures of a part of a layer, and `again`: forward (or what is `repeated` of it) without its communication, no more than
    what a full recompute repeats."""
    found = _figures(estimator, Piece(PART, part.forward, part.backward, part.saved, part.working), layout)
    again = estimator.pieces.computation(part.forward if repeated is None else repeated, layout)
    return np.array([*found, again])


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
