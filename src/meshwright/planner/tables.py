"""What layers, experts and state cost on a rank, for every local choice of a space: the estimator's own prices, each asked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.estimate import Durations, Estimator
from meshwright.cost.ops import PART, Piece
from meshwright.cost.pieces import Part, Shapes, embedding_piece, experts, gated_mlp, head_piece, layer_piece
from meshwright.planner.space import Floats, Ints, Local, Space
from meshwright.spec.layout import Layout
from meshwright.spec.shards import Seat, Shard, Split, chunk_shards

FIGURES = ("forward", "backward", "weight", "saved", "working", "crowded")
"""Seconds of one micro-batch forward, backward, and of the weight gradients in it; bytes kept, and of the largest temporary; seconds
of both passes while every rank of the node computes."""

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
    """`pieces[figure]` is [kinds + 2, combinations of the space]: each kind of layer, then the embedding and the head.

    `split` says which way to cut parameters a combination has.
    """

    kinds: tuple[Kind, ...]
    pieces: dict[str, Floats]
    boundary: Floats
    """Bytes of one hidden state that a stage sends."""
    shards: tuple[tuple[ShardSizes, ...], ...]
    """[splits][kinds + 2]: what a rank holds of each of these."""
    split: Ints


def make_tables(space: Space, estimator: Estimator) -> Tables:
    """Prices of every combination. The prices of experts do not depend on how attention is cut, nor those of attention on how
    experts are: each is asked apart, and a layer with experts costs what one without costs, and the difference."""
    model = space.model
    layers = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
    kinds = tuple(dict.fromkeys(layers))
    local = {name: np.empty((len(kinds) + 2, len(space.locals))) for name in FIGURES}
    boundary = np.empty(len(space.locals))
    ends: dict[tuple[int, bool, int, int], list[dict[str, float]]] = {}
    for at, one in enumerate(space.locals):
        layout, seq = one.layout(space.gpus, space.precision), space.workload.seq
        rows = [_figures(estimator, layer_piece(model, layout, seq, window), layout) for window, _ in kinds]
        key = (one.tp, one.sp, one.cp, one.micro_batch)  # attention and what is recomputed change neither end of the model
        if key not in ends:
            pieces = (embedding_piece(model, layout, seq), head_piece(model, layout, seq, 0))
            ends[key] = [_figures(estimator, piece, layout) for piece in pieces]
        for row, figures in enumerate((*rows, *ends[key])):
            for name, value in figures.items():
                local[name][row, at] = value
        boundary[at] = Shapes(model, layout, seq).residual_bytes
    whole = {name: table[:, space.local] for name, table in local.items()}
    if model.experts is not None:
        _add_experts(space, estimator, kinds, whole)
    return Tables(kinds, whole, boundary[space.local], *_shards(space, kinds))


def _add_experts(space: Space, estimator: Estimator, kinds: Sequence[Kind], whole: dict[str, Floats]) -> None:
    """Add to the kinds with experts what these cost more than a plain MLP, for as many tokens on a rank."""
    model, seq = space.model, space.workload.seq
    rows = [row for row, (_, moe) in enumerate(kinds) if moe]

    def extra(key: tuple[int, int, bool], expert: int) -> Floats:
        tokens, tp, sp = key
        layout = Local(tp, sp, 1, 1, 1, "none").layout(space.gpus, space.precision, *space.experts[expert])
        shapes = Shapes(model, layout, tokens)
        assert model.experts is not None
        with_, without = (
            _part_figures(estimator, part, layout)
            for part in (experts(shapes, model.experts), gated_mlp(shapes, "mlp", model.ffn // tp))
        )
        more: Floats = with_ - without
        more[-1] = with_[-1] - without[0]
        return more

    keys = [(x.micro_batch * seq // x.cp, x.tp, x.sp) for x in space.locals]
    ids = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    of_local = np.array([ids[key] for key in keys], dtype=np.int64)
    unique, which = np.unique(of_local[space.local] * len(space.experts) + space.expert, return_inverse=True)
    named = list(ids)
    pairs = [divmod(u, len(space.experts)) for u in unique.tolist()]
    values = np.array([extra(named[key], expert) for key, expert in pairs])
    forward, backward, weight, saved, crowded, again = values[which].T
    full = np.array([x.recompute == "full" for x in space.locals])[space.local]
    for row in rows:
        whole["forward"][row] += forward
        whole["backward"][row] += backward + full * again
        whole["weight"][row] += weight
        whole["saved"][row] += ~full * saved
        whole["working"][row] += full * saved
        whole["crowded"][row] += crowded


def _part_figures(estimator: Estimator, part: Part, layout: Layout) -> Floats:
    """[forward, backward, weight, saved, crowded, again] of a part of a layer; `again` is forward without its communication: no more
    than what a full recompute repeats."""
    found = _figures(estimator, Piece(PART, part.forward, part.backward, part.saved), layout)
    again = estimator.durations(((Piece(PART, part.forward, (), 0), 1),), layout, shared=False).compute
    return np.array([*(found[name] for name in ("forward", "backward", "weight", "saved", "crowded")), again])


def _figures(estimator: Estimator, piece: Piece, layout: Layout) -> dict[str, float]:
    piece = replace(piece, name=PART)
    alone = estimator.durations(((piece, 1),), layout, shared=False)
    crowded = 0.0
    if estimator.cluster.node.compute_slots is not None:
        busy: Durations = estimator.durations(((piece, 1),), layout, shared=True)
        crowded = busy.forward + busy.backward
    return {
        "forward": alone.forward,
        "backward": alone.backward,
        "weight": alone.weight,
        "saved": piece.saved_bytes,
        "working": piece.working_bytes,
        "crowded": crowded,
    }


def _shards(space: Space, kinds: Sequence[Kind]) -> tuple[tuple[tuple[ShardSizes, ...], ...], Ints]:
    """What the first rank holds of each kind of layer, of the embedding and of the head, for each split; which split each
    combination has."""
    model = space.model
    first = [next(i for i in range(model.layers) if (model.window(i), model.is_moe(i)) == kind) for kind in kinds]
    ids = {key: at for at, key in enumerate(dict.fromkeys((x.tp, x.sp) for x in space.locals))}
    of_local = np.array([ids[x.tp, x.sp] for x in space.locals], dtype=np.int64)
    out = []
    for split in (Split(tp, sp, ep, etp) for tp, sp in ids for ep, etp in space.experts):
        parts = [chunk_shards(model, split, Seat(), range(i, i + 1), False, False) for i in first]
        parts += [chunk_shards(model, split, Seat(), range(0), at == 0, at == 1) for at in range(2)]
        out.append(tuple(_sizes(shards) for shards in parts))
    return tuple(out), of_local[space.local] * len(space.experts) + space.expert


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
