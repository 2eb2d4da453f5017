"""What does not divide is refused with the numbers, and the way out that the refusal names does work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.legality import (
    check_layout,
    check_room,
    check_world,
    micro_batches,
    refuse_unbuilt,
    refuse_unrunnable_model,
)
from meshwright.spec.model import Model, Rope
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

MODEL = Model(
    name="m", family="llama", layers=6, hidden=48, ffn=96, vocab=101, heads=12, kv_heads=4, head_dim=4, max_positions=64
)
GPT2 = replace(MODEL, name="g", rope=None)
WORK = Workload(seq=32, global_batch=12)


def refusal(layout: str, model: Model = MODEL, workload: Workload = WORK) -> str:
    with pytest.raises(UserError) as refused:
        check_layout(parse_layout(layout), model, workload)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def legal(layout: str, model: Model = MODEL, workload: Workload = WORK) -> bool:
    check_layout(parse_layout(layout), model, workload)
    return True


# --- what a model and a batch can be split by

REFUSED: list[tuple[str, Model, Workload, tuple[str, ...]]] = [
    ("tp5", MODEL, WORK, ("tp 5", "12 attention heads of m", "legal tp: 1, 2,")),
    ("tp24", MODEL, WORK, ("tp 24", "12 attention heads")),
    ("tp6", MODEL, WORK, ("tp 6", "4 key-value heads of m")),
    ("tp3", replace(MODEL, kv_heads=3, ffn=100), WORK, ("tp 3", "MLP width 100 of m", "legal tp: 1")),
    ("tp4", replace(MODEL, vocab=9), WORK, ("tp 4", "9 vocabulary rows of m")),
    ("tp4", replace(MODEL, vocab=3), WORK, ("tp 4", "3 vocabulary rows")),
    ("tp4:sp", MODEL, Workload(seq=30, global_batch=12), ("30 tokens", "mb 1 x seq 30", "tp 4", "seq 32")),
    ("tp4:sp mb3", MODEL, Workload(seq=30, global_batch=12), ("90 tokens", "mb 3 x seq 30", "tp 4", "seq 32")),
    ("pp8", MODEL, WORK, ("m has 6 layers", "8 stages of pp8", "at most 6")),
    ("pp4x2:interleaved", MODEL, WORK, ("6 layers", "8 stages of pp4x2", "pp x chunks is at most 6")),
    ("dp5", MODEL, WORK, ("dp 5 x micro_batch 1 = 5", "does not divide 12", "10 or 15")),
    ("dp3 mb3", MODEL, WORK, ("dp 3 x micro_batch 3 = 9", "does not divide 12", "9 or 18")),
    ("dp24", MODEL, WORK, ("dp 24 x micro_batch 1 = 24", "does not divide 12", "batch of 24")),
    ("tp4", GPT2, Workload(seq=65, global_batch=12), ("g has 64 learned positions", "seq 65")),
]


@pytest.mark.parametrize(("layout", "model", "workload", "said"), REFUSED, ids=[f"{r[0]} {r[3][0]}" for r in REFUSED])
def test_what_does_not_divide_is_refused(layout: str, model: Model, workload: Workload, said: tuple[str, ...]) -> None:
    message = refusal(layout, model, workload)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("mb1", MODEL),
        ("dp12", MODEL),
        ("dp2 mb6", MODEL),
        ("tp2", MODEL),
        ("tp4:sp", MODEL),
        ("tp12", MODEL),  # each key-value head on three ranks
        ("pp6", MODEL),
        ("pp3x2:interleaved", MODEL),
        ("tp4", replace(MODEL, vocab=10)),  # 3 + 3 + 3 + 1
        ("tp4", replace(GPT2, max_positions=32)),
    ],
)
def test_what_divides_is_not(layout: str, model: Model) -> None:
    assert legal(layout, model)


# --- the way out that a refusal names


@settings(deadline=None)
@given(dp=st.integers(1, 40), mb=st.integers(1, 8), batch=st.integers(1, 100))
def test_the_batches_it_offers_are_the_nearest_legal_ones(dp: int, mb: int, batch: int) -> None:
    assume(batch % (dp * mb))
    message = refusal(f"dp{dp} mb{mb}", workload=Workload(seq=32, global_batch=batch))
    offered = [int(n) for n in re.findall(r"\d+", message.split("try a global batch of ")[1])]
    every = [n for n in range(1, batch + dp * mb + 1) if n % (dp * mb) == 0]
    assert offered == [n for n in every if abs(n - batch) < dp * mb]
    assert all(legal(f"dp{dp} mb{mb}", workload=Workload(seq=32, global_batch=n)) for n in offered)


@settings(deadline=None)
@given(seq=st.integers(1, 70), mb=st.integers(1, 4))
def test_the_sequence_it_offers_is_legal(seq: int, mb: int) -> None:
    assume(seq * mb % 4)
    message = refusal(f"tp4:sp mb{mb}", workload=Workload(seq, 12))
    offered = int(message.split("try seq ")[1])
    assert 0 <= offered - seq < 4
    assert legal(f"tp4:sp mb{mb}", workload=Workload(offered, 12))


@st.composite
def dense_models(draw: st.DrawFn) -> Model:
    kv_heads = draw(st.integers(1, 10))
    heads = kv_heads * draw(st.integers(1, 6))
    ffn, vocab = draw(st.integers(1, 8)) * draw(st.sampled_from((12, 16, 20, 30, 35))), draw(st.integers(40, 200))
    return replace(MODEL, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab)


@settings(max_examples=300, deadline=None)
@given(dense_models(), st.integers(2, 64))
def test_every_tensor_parallel_degree_it_calls_legal_is(model: Model, tp: int) -> None:
    try:
        check_layout(parse_layout(f"tp{tp}"), model, WORK)
    except UserError as error:
        offered = re.search(r"(?:legal|try) tp:? (.*)", str(error))
        for degree in re.findall(r"\d+", offered[1]) if offered else ():
            assert legal(f"tp{degree}", model), error


# --- how many ranks


@pytest.mark.parametrize(
    ("layout", "ranks", "said"),
    [
        ("dp4 tp8 pp2", 128, ("pp2 x dp4 x tp8 = 64 ranks", "128 are given", "dp8 would fill 128")),
        ("dp4 tp8 pp2", 72, ("= 64 ranks", "72 are given", "one replica takes 16, which does not divide 72")),
        ("mb1", 8, ("dp1 = 1 ranks", "8 are given", "dp8 would fill 8")),
        ("dp2 tp2 cp2", 4, ("dp2 x cp2 x tp2 = 8 ranks", "4 are given", "dp1 would fill 4")),
        ("tp8", 4, ("tp8 = 8 ranks", "4 are given", "one replica takes 8")),
    ],
)
def test_a_world_that_is_not_the_ranks_given_is_refused(layout: str, ranks: int, said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        check_world(parse_layout(layout), ranks)
    message = str(refused.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_a_world_of_just_the_ranks_given_is_not() -> None:
    check_world(parse_layout("dp4 tp8 pp2 cp2"), 128)


@pytest.mark.parametrize("ranks", [0, -8])
def test_no_ranks_at_all_are_refused_without_a_hint_that_nobody_can_follow(ranks: int) -> None:
    with pytest.raises(UserError) as refused:
        check_world(parse_layout("dp4"), ranks)
    assert str(ranks) in str(refused.value)
    assert f"dp{ranks}" not in str(refused.value)


def test_a_cluster_without_network_has_room_for_one_node() -> None:
    local = load_cluster("local")
    check_room(parse_layout(f"dp{local.node.accelerators}"), local)
    check_room(parse_layout("dp64 tp8"), load_cluster("h100-superpod"))
    with pytest.raises(
        UserError, match=r"local is one node of 4 ranks without a network, but the layout needs 8:.*--ranks 8"
    ) as refused:
        check_room(parse_layout("dp8"), local)
    assert "\n" not in str(refused.value)


@given(dp=st.integers(1, 8), mb=st.integers(1, 8), m=st.integers(1, 8))
def test_micro_batches_close_the_batch_equation(dp: int, mb: int, m: int) -> None:
    layout = parse_layout(f"dp{dp} mb{mb}")
    assert micro_batches(layout, Workload(seq=32, global_batch=dp * mb * m)) == m


@pytest.mark.parametrize(
    ("seq", "batch", "said"), [(0, 8, "seq must be at least 1, got 0"), (8, -1, "global_batch must be at least 1, got -1")]
)
def test_a_workload_of_nothing_is_refused(seq: int, batch: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"^{said}$"):
        Workload(seq, batch)


# --- what this version builds


@pytest.mark.parametrize(
    "layout",
    [
        "mb1",
        "dp2:zero1 tp2:sp pp2:gpipe mb1 ac:full fp32",
        "pp2 fp64",
        "dp2 order:pp-dp-cp-tp",
        "tp2:async fp8",
        "mb1 params:fp32 grads:bf16",
        "mb1 fp16 grads:fp16 offload:optimizer@file",
        "dp2:zero3 mb1 offload:all",
        "ac:core+norms+mlp:3",
        "ac:norms+activation",
        "ac:full:2",
    ],
)
def test_a_mode_that_is_built_is_not_refused(layout: str) -> None:
    refuse_unbuilt(parse_layout(layout))


def test_recompute_of_an_activation_that_keeps_only_its_output_is_refused() -> None:
    layout, plain_relu = parse_layout("ac:activation"), replace(GPT2, gated=False, activation="relu")
    with pytest.raises(UserError, match=r"^ac:activation would change nothing for .*: relu .*; try ac:norms or ac:mlp$"):
        check_layout(layout, plain_relu, Workload(seq=32, global_batch=8))
    check_layout(layout, GPT2, Workload(seq=32, global_batch=8))
    check_layout(layout, replace(plain_relu, gated=True), Workload(seq=32, global_batch=8))


def test_a_rotary_rule_that_the_engine_does_not_know_can_be_priced_but_not_run() -> None:
    unknown = replace(MODEL, rope=Rope(scaling="longrope"))
    with pytest.raises(UserError, match=r"^m: rotary scaling 'longrope'.*legal: none, llama3, yarn$"):
        refuse_unrunnable_model(unknown)
    refuse_unrunnable_model(replace(MODEL, rope=Rope(llama3=(8.0, 1.0, 4.0, 32))))
    refuse_unrunnable_model(GPT2)
