"""The shards of all ranks tile every parameter: each element is held by just as many ranks as the table says."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.schedule.stages import rank_shards
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout
from meshwright.spec.model import Model, Rope
from meshwright.spec.parameters import parameters
from meshwright.spec.shards import TIED_NAME, Seat, Shard
from meshwright.spec.workload import Workload

WORK = Workload(seq=16, global_batch=4)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Model, Layout]:
    """A small dense model and a layout that is legal for it."""
    tp = draw(st.sampled_from((1, 2, 3, 4, 6)))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if n % tp == 0 or tp % n == 0]))
    heads = max(tp, kv_heads) * draw(st.integers(1, 2))
    # The vocabulary is cut into ceil(vocab / tp) rows a rank; the last rank gets what is left, of which there must be some.
    share, left = draw(st.integers(1, 9)), draw(st.integers(0, 8))
    vocab = (tp - 1) * share + min(share, left + 1)
    bias = st.booleans()
    model = Model(
        name="random",
        family="llama",
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.integers(1, 12)),
        ffn=tp * draw(st.integers(1, 5)),
        vocab=vocab,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        max_positions=draw(st.integers(16, 20)),
        norm=draw(st.sampled_from(("rmsnorm", "layernorm"))),
        gated=draw(st.booleans()),
        rope=draw(st.sampled_from((Rope(), None))),
        position_offset=draw(st.sampled_from((0, 2))),
        qkv_bias=draw(bias),
        out_bias=draw(bias),
        mlp_bias=draw(bias),
        qk_norm=draw(bias),
        tied=draw(st.booleans()),
    )
    layout = Layout(
        tp=tp,
        pp=draw(st.integers(1, model.layers)),
        dp=draw(st.sampled_from((1, 2))),
        sp=tp > 1 and 16 % tp == 0 and draw(st.booleans()),
    )
    check_layout(layout, model, WORK)
    return model, layout


def held(model: Model, layout: Layout, stage: int, tp_rank: int) -> tuple[Shard, ...]:
    return rank_shards(model, layout, stage, Seat(tp=tp_rank))


def expected_replicas(model: Model, layout: Layout, shard: Shard) -> int:
    return {None: 1, "tp": layout.tp, "kv": layout.tp // model.kv_heads, "embedding": 2}[shard.replicas]


def rows_held(shard: Shard) -> range:
    """Along its cut; a shard that is not cut counts as one row."""
    if not shard.cuts:
        return range(1)
    ((_, start, length),) = shard.cuts
    return range(start, start + length)


@settings(max_examples=300, deadline=None)
@given(splits())
def test_shards_tile_every_parameter(split: tuple[Model, Layout]) -> None:
    model, layout = split
    shards = defaultdict(list)
    for stage in range(layout.pp):
        for tp_rank in range(layout.tp):
            names = [shard.name for shard in held(model, layout, stage, tp_rank)]
            assert len(set(names)) == len(names)
            for shard in held(model, layout, stage, tp_rank):
                shards[shard.name].append(shard)
    assert set(shards) == {parameter.name for parameter in parameters(model)}
    for parameter in parameters(model):
        its = shards[parameter.name]
        assert {(s.global_shape, s.decay) for s in its} == {(parameter.shape, parameter.decay)}
        assert len({(tuple(dim for dim, _, _ in s.cuts), s.replicas, s.partial) for s in its}) == 1
        counts = [0] * (parameter.shape[its[0].cuts[0][0]] if its[0].cuts else 1)
        for s in its:
            for row in rows_held(s):
                counts[row] += 1
        assert set(counts) == {expected_replicas(model, layout, its[0])}, parameter


@settings(deadline=None)
@given(splits())
def test_a_shard_is_never_empty_and_counts_its_shape(split: tuple[Model, Layout]) -> None:
    model, layout = split
    for stage in range(layout.pp):
        for tp_rank in range(layout.tp):
            for shard in held(model, layout, stage, tp_rank):
                assert shard.numel == prod(shard.shape) > 0
                assert len(shard.shape) == len(shard.global_shape)
                assert all(part <= whole for part, whole in zip(shard.shape, shard.global_shape, strict=True))


@settings(deadline=None)
@given(splits())
def test_all_ranks_together_hold_each_parameter_once_beside_its_replicas(split: tuple[Model, Layout]) -> None:
    model, layout = split
    total = 0
    for stage in range(layout.pp):
        for tp_rank in range(layout.tp):
            its = held(model, layout, stage, tp_rank)
            total += sum(
                12 * shard.numel // expected_replicas(model, layout, shard) for shard in its
            )  # 12: divides by 1, 2, 3, 4 and 6
    assert total == 12 * sum(parameter.numel for parameter in parameters(model))


@settings(deadline=None)
@given(splits())
def test_gradients_that_need_summing_are_those_whose_replicas_see_a_part(split: tuple[Model, Layout]) -> None:
    """Norm regions see every token unless sequence parallel cuts them; per-head norms and shared key-value heads see some heads;
    the two ends of the pipeline each see one use of a tied table."""
    model, layout = split
    roles = {parameter.name: parameter.role for parameter in parameters(model)}
    for stage in range(layout.pp):
        for shard in held(model, layout, stage, 0):
            if shard.name == TIED_NAME and model.tied and layout.pp > 1:
                expected = ("embedding", True)
            elif layout.tp == 1 or roles[shard.name] in ("vocab", "column", "row"):
                expected = (None, False)
            elif roles[shard.name] == "kv":
                expected = ("kv", True) if layout.tp > model.kv_heads else (None, False)
            else:
                expected = ("tp", roles[shard.name] == "head" or layout.sp)
            assert (shard.replicas, shard.partial) == expected, shard


@settings(deadline=None)
@given(splits())
def test_the_ranks_of_a_key_value_group_hold_the_same_head_and_its_queries(split: tuple[Model, Layout]) -> None:
    model, layout = split
    grid = Grid(layout)
    per_group = model.heads // model.kv_heads
    for rank in range(layout.tp):
        its = {s.name: s for s in held(model, layout, 0, rank)}
        keys, queries = its["layers.0.attention.qkv.k.weight"], its["layers.0.attention.qkv.q.weight"]
        if keys.replicas == "kv":
            for other in grid.block(grid.group("tp", rank), rank, layout.tp // model.kv_heads):
                theirs = {s.name: s for s in held(model, layout, 0, grid.coordinates(other)["tp"])}
                assert theirs[keys.name] == keys
        query_heads = {
            row // model.head_dim for row in (rows_held(queries) if queries.cuts else range(queries.numel // model.hidden))
        }
        key_heads = {row // model.head_dim for row in (rows_held(keys) if keys.cuts else range(keys.numel // model.hidden))}
        assert {head // per_group for head in query_heads} == key_heads


def test_an_uneven_vocabulary_by_hand() -> None:
    model = Model(
        name="m",
        family="llama",
        layers=2,
        hidden=4,
        ffn=8,
        vocab=101,
        heads=4,
        kv_heads=2,
        head_dim=2,
        max_positions=8,
        tied=True,
    )
    layout = Layout(tp=4, pp=2)
    rows = [[s for s in held(model, layout, stage, rank) if s.name == TIED_NAME] for stage in (0, 1) for rank in range(4)]
    assert [(*s.cuts[0][1:], s.replicas, s.partial) for [s] in rows] == [
        (0, 26, "embedding", True), (26, 26, "embedding", True), (52, 26, "embedding", True), (78, 23, "embedding", True),
    ] * 2  # fmt: skip
    untied = replace(model, tied=False)
    assert [s.name for s in held(untied, layout, 1, 0)][-2:] == ["norm.weight", "head.weight"]
    assert TIED_NAME not in [s.name for s in held(untied, layout, 1, 0)]
