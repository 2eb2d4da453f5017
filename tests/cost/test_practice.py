"""What changes when other software runs the same split: operators, bytes kept, seconds of the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.adapt import (
    FRAGMENTED,
    GATHERED_BYTES,
    LOSS_BYTES,
    as_practised,
    is_recomputed,
    with_buckets_of,
    with_gradients_of,
)
from meshwright.cost.estimate import Estimator
from meshwright.cost.kernels import Kernels
from meshwright.cost.ops import Collective, Elementwise, Gemm, Piece, Under
from meshwright.cost.pieces import head_piece, layer_piece
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.program import Place, rank_program
from meshwright.cost.tiles import product_seconds
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.kernels import load_kernel_constants
from meshwright.spec.layout import Layout
from meshwright.spec.model import Experts
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

MODEL, H100 = load_model("llama-3-8b"), load_cluster("h100-superpod")
SEQ = 4096
MEGATRON = Practice(whole_recompute=True, loss="parallel", gathers_experts=True)


def layer(layout: Layout, practice: Practice, model: object = MODEL) -> Piece:
    return as_practised(layer_piece(model, layout, SEQ, None, model.experts is not None), practice, model, layout, SEQ)  # type: ignore[attr-defined, arg-type]


def head(layout: Layout, practice: Practice) -> Piece:
    return as_practised(head_piece(MODEL, layout, SEQ, 0), practice, MODEL, layout, SEQ)


def names(piece: Piece) -> list[str]:
    flat = [w for op in piece.backward for w in (op.work if isinstance(op, Under) else (op,))]
    return [getattr(op, "name", "") for op in flat]


def test_the_engines_own_practice_changes_nothing() -> None:
    for text in ("mb1", "tp4:sp mb1 ac:full"):
        layout = parse_layout(text)
        assert layer(layout, OWN) == layer_piece(MODEL, layout, SEQ, None)


def test_whole_recompute_runs_the_last_sum_again_too() -> None:
    layout = parse_layout("mb1 ac:full")
    own, whole = layer(layout, OWN), layer(layout, MEGATRON)
    assert whole.backward[: len(whole.forward)] == whole.forward
    assert names(own).count("mlp.down") == names(whole).count("mlp.down") == 1
    assert len(whole.backward) > len(own.backward)
    assert is_recomputed(whole)
    assert not is_recomputed(layer(parse_layout("mb1"), MEGATRON))


def test_frozen_weights_have_no_gradients() -> None:
    layout = parse_layout("dp8:zero1 tp4:sp mb1")
    piece = layer(layout, Practice(frozen=True))
    assert not [n for n in names(piece) if n.endswith(" dw")]
    assert [n for n in names(piece) if n.endswith(" dx")]
    work = Workload(SEQ, 64)
    trained, frozen = (Estimator(MODEL, H100, work, Practice(frozen=f)).played(layout) for f in (False, True))
    assert frozen.step_time_s < 0.8 * trained.step_time_s
    assert frozen.peak_bytes < trained.peak_bytes - 8e9  # 16 bytes a parameter of 2 x 10^9, less what is cut over ranks


@pytest.mark.parametrize("loss", ["fused", "parallel", "whole"])
def test_the_loss_decides_what_logits_take(loss: str) -> None:
    layout = parse_layout("tp8 mb1")
    piece = head(layout, Practice(loss=loss))  # type: ignore[arg-type]
    ranks = 1 if loss == "whole" else 8
    gathered = GATHERED_BYTES if loss == "whole" else 0
    assert piece.working_bytes == (LOSS_BYTES[loss] + gathered) * SEQ * MODEL.vocab // ranks
    alone = parse_layout("mb1")
    assert head(alone, Practice(loss=loss)).working_bytes == LOSS_BYTES[loss] * SEQ * MODEL.vocab  # type: ignore[arg-type]
    gathers = [op for op in piece.forward if isinstance(op, Collective) and op.op == "all_gather"]
    assert [op.bytes for op in gathers] == ([SEQ * MODEL.vocab * 2] if loss == "whole" else [])


def test_kernels_that_write_scores_keep_them() -> None:
    layout = parse_layout("tp4 mb2")
    scores = 2 * (MODEL.heads // 4) * SEQ**2
    flash, softmax, unfused = (
        layer(layout, Practice(attention=a)).saved_bytes for a in ("flash", "fused-softmax", "unfused")
    )  # type: ignore[arg-type]
    assert (softmax - flash, unfused - flash) == (5 * scores, 6 * scores)
    again = layer(parse_layout("tp4 mb2 ac:selective"), Practice(attention="unfused")).saved_bytes
    assert again <= flash


def test_code_of_its_own_keeps_what_megatron_does_not() -> None:
    layout = parse_layout("tp4:sp mb2")
    tokens, own = 2 * SEQ, layer(layout, OWN).saved_bytes

    def kept(practice: Practice) -> int:
        piece = layer_piece(MODEL, layout, SEQ, None)
        return as_practised(piece, practice, MODEL, layout, tokens).saved_bytes - own

    assert kept(Practice(keeps_gathered=True)) == 2 * tokens * MODEL.hidden * 2 * 3 // 4
    rotated = tokens * (MODEL.heads + MODEL.kv_heads) * MODEL.head_dim * 2 // 4
    assert kept(Practice(packed_qkv=True)) == rotated + tokens * 4 * MODEL.head_dim * 2
    assert kept(Practice(fragments=True)) == int(FRAGMENTED * own)
    assert kept(Practice(fused_activation=True)) == -tokens * MODEL.ffn * 2 // 4


def test_code_of_its_own_sums_more_often() -> None:
    def backward(layout: Layout, practice: Practice, op: str) -> int:
        calls = [o.calls for o in layer(layout, practice).backward if isinstance(o, Under) and o.collective.op == op]
        return sum(calls)

    plain, cut = parse_layout("tp4 mb1"), parse_layout("tp4:sp mb1")
    apart = Practice(separate_columns=True)
    assert (backward(plain, Practice(), "all_reduce"), backward(plain, apart, "all_reduce")) == (2, 3)
    gathered = Practice(keeps_gathered=True)
    assert (backward(cut, Practice(), "all_gather"), backward(cut, gathered, "all_gather")) == (2, 0)
    assert sorted(names(layer(cut, gathered))) == sorted(names(layer(cut, OWN)))


def test_whole_gradients_cross_the_wire_twice_and_wide() -> None:
    layout = parse_layout("dp8:zero1 mb1")
    own, whole = (
        Estimator(MODEL, H100, Workload(SEQ, 64), practice).reduced_program(layout, Place()).gradient_reductions
        for practice in (Practice(gradient_bytes=2), Practice(gradient_bytes=2, whole_gradients=True))
    )
    assert {c.op for c in own} == {"reduce_scatter"}
    assert {c.op for c in whole} == {"all_reduce"}
    assert sum(c.bytes for c in whole) == 2 * sum(c.bytes for c in own)


def test_narrower_gradients_are_reduced_in_fewer_bytes() -> None:
    layout = parse_layout("dp64 mb1")
    program = rank_program(MODEL, layout, Workload(SEQ, 64), Place())
    narrow = with_gradients_of(program, layout, Practice(gradient_bytes=2))
    assert [c.bytes for c in narrow.gradient_reductions] == [c.bytes // 2 for c in program.gradient_reductions]
    assert with_gradients_of(program, layout, OWN) == program
    # Five passes over gradients in the update, each of two bytes less.
    assert program.optimizer.bytes - narrow.optimizer.bytes == sum(2 * (b.numel + 4 * b.owned) for b in program.buckets)


def test_a_row_crosses_the_expert_parallel_ranks_once() -> None:
    model = replace(MODEL, experts=Experts(count=8, top_k=2, ffn=4096), moe_layers=tuple(range(MODEL.layers)))
    layout = parse_layout("dp8 tp4:sp ep8 etp4 mb1")
    own, megatron = layer(layout, OWN, model), layer(layout, MEGATRON, model)

    def sent(piece: Piece, op: str) -> list[tuple[int, int]]:
        return [
            (c.group_size, c.bytes) for c in piece.forward if isinstance(c, Collective) and c.op == op and c.axis != "tp"
        ]

    (_, travel), *_ = sorted(sent(own, "all_to_all"), key=lambda call: -call[1])
    assert (32, travel) in sent(own, "all_to_all")
    assert sent(megatron, "all_to_all").count((8, travel // 4)) == 2
    assert sent(megatron, "all_gather").count((4, travel)) == 2


def test_buckets_of_another_size_carry_the_same_bytes() -> None:
    layout = parse_layout("dp8:zero1 tp4:sp mb1")
    program = rank_program(MODEL, layout, Workload(SEQ, 64), Place(0))
    smaller = with_buckets_of(program, 25_000_000)
    assert max(c.bytes for c in smaller.gradient_reductions) == 25_000_000
    assert sum(c.bytes for c in smaller.gradient_reductions) == sum(c.bytes for c in program.gradient_reductions)
    assert with_buckets_of(program, None) is program
    own, small = (Estimator(MODEL, H100, Workload(SEQ, 64), Practice(bucket_bytes=size)) for size in (None, 1_000_000))
    assert small.played(layout).step_time_s > own.played(layout).step_time_s
    assert small.estimate(layout).step_time_s == pytest.approx(small.played(layout).step_time_s)


# --- kernels


def test_a_host_that_waits_comes_on_top_of_the_kernels() -> None:
    # One stage, so that a step is one micro-batch after the other; full recompute runs the forward, and waits, once more.
    work, layers = Workload(SEQ, 8), MODEL.layers
    for text, forwards in (("mb8", 1), ("mb8 ac:full", 2)):
        layout = parse_layout(text)
        ahead, waits = (Estimator(MODEL, H100, work, Practice(whole_recompute=True, waits=w)) for w in (False, True))
        forward = layer(layout, ahead.practice).forward
        host = ahead.kernels(layout, shared=False).host_seconds(forward, False)
        more = waits.played(layout).step_time_s - ahead.played(layout).step_time_s
        assert more == pytest.approx(forwards * layers * host, rel=1e-6)


def test_experts_one_by_one_cost_a_product_each() -> None:
    grouped, looped = Kernels(H100, "bf16", 1), Kernels(H100, "bf16", 1, Practice(grouped_products=False))
    product = Gemm("moe.experts.up", 8192, 4096, 4096, 8)
    assert looped.gemm(product) == pytest.approx(8 * grouped.gemm(Gemm("moe.experts.up", 1024, 4096, 4096)))
    assert looped.gemm(product) > grouped.gemm(product)
    assert looped.host_seconds([product], False) == pytest.approx(8 * grouped.host_seconds([product], False))
    dense = Gemm("scores", 8192, 4096, 4096, 8)
    assert looped.gemm(dense) == grouped.gemm(dense)


def test_a_wave_of_tiles_more_costs_a_wave() -> None:
    constants = load_kernel_constants().model_copy(update={"tiles": ((256, 128, 1.0),), "least_split": 10**9})
    rate, processors = 132e12, 132

    def seconds(tiles: int) -> float:
        return product_seconds(Gemm("g", 256 * tiles, 128, 8192), rate, processors, 1e12, constants)

    wave = 2 * 256 * 128 * (8192 + constants.tile_fill) / (rate / processors)
    assert [seconds(n) for n in (1, 132, 133, 264)] == pytest.approx([wave, wave, 2 * wave, 2 * wave])


def test_a_long_thin_product_is_cut_along_its_inner_dimension() -> None:
    constants = load_kernel_constants()
    whole = constants.model_copy(update={"least_split": 10**9})
    op = Gemm("dw", 512, 512, 65536)
    assert product_seconds(op, 8e14, 132, 3e12, constants) < 0.5 * product_seconds(op, 8e14, 132, 3e12, whole)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 8192), st.integers(0, 2), st.integers(1, 4096))
def test_a_larger_product_never_takes_less_time(m: int, n: int, k: int, which: int, more: int) -> None:
    sizes = [m, n, k]
    larger = [size + more * (i == which) for i, size in enumerate(sizes)]
    times = [product_seconds(Gemm("g", *s), 8e14, 132, 3e12, load_kernel_constants()) for s in (sizes, larger)]
    assert times[1] >= times[0] * (1 - 1e-9)


def test_narrow_products_cost_the_cast_of_their_activations() -> None:
    wide, narrow = Kernels(H100, "bf16", 1), Kernels(H100, "bf16", 1, Practice(products="fp8"))
    forward, weights = Gemm("mlp.up", 8192, 8192, 8192), Gemm("mlp.up dw", 8192, 8192, 8192)
    assert narrow.gemm(forward) < wide.gemm(forward)
    assert narrow.gemm(forward) - narrow.gemm(weights) == pytest.approx(4 * 8192**2 / narrow.memory_bandwidth)
    assert narrow.gemm(forward._replace(name="head.weight")) == wide.gemm(forward._replace(name="head.weight"))


def test_the_engine_multiplies_linears_in_8_bits_and_nothing_else() -> None:
    """`parallel/fp8.py`: factors are cast at every use, the weight of an input gradient is turned, weight gradients stay in bf16."""
    wide, narrow = Kernels(H100, "bf16", 1), Kernels(H100, "fp8", 1)
    forward, backward = Gemm("mlp.up", 8192, 8192, 8192), Gemm("mlp.up dx", 8192, 8192, 8192)
    assert narrow.gemm(forward) < wide.gemm(forward)
    assert narrow.gemm(backward) - narrow.gemm(forward) == pytest.approx(2 * 8192**2 / narrow.memory_bandwidth)
    for name, n, groups in (
        ("mlp.up dw", 8192, 1),
        ("head.weight", 8192, 1),
        ("moe.router", 64, 1),
        ("moe.experts.up", 8192, 8),
        ("mlp.up", 8200, 1),
    ):
        op = Gemm(name, 8192, n, 8192, groups)
        assert narrow.gemm(op) == wide.gemm(op), name
    assert narrow.peak_flops == wide.peak_flops


def test_narrow_products_of_little_work_are_no_gain() -> None:
    wide, narrow = Kernels(H100, "bf16", 1), Kernels(H100, "fp8", 1)
    small = Gemm("mlp.up", 512, 1024, 1024)
    assert narrow.gemm(small) > wide.gemm(small)
    assert narrow.host_seconds((small,), False) > wide.host_seconds((small,), False)


def test_4_bits_are_quicker_than_8_where_there_are_units_for_them() -> None:
    op, b200 = Gemm("mlp.up", 8192, 8192, 8192), load_cluster("b200-superpod")
    assert Kernels(b200, "fp4", 1).gemm(op) < Kernels(b200, "fp8", 1).gemm(op) < Kernels(b200, "bf16", 1).gemm(op)
    with pytest.raises(UserError, match="h100-sxm has no fp4 rate"):
        _ = Kernels(H100, "fp4", 1).peak_flops


def test_flash_attention_written_for_an_older_accelerator_is_slower_on_a_newer_one() -> None:
    old, new = Kernels(H100, "bf16", 1, Practice(attention="flash2")), Kernels(H100, "bf16", 1)
    op = next(op for op in layer_piece(MODEL, Layout(), SEQ, None).forward if type(op).__name__ == "Attention")
    assert old.attention(op) > 1.3 * new.attention(op)  # type: ignore[arg-type]


def test_small_operators_wait_for_the_host_unless_compiled() -> None:
    ops = (Elementwise("norm", 1e3),) * 100
    constants = load_kernel_constants()
    eager, compiled = Kernels(H100, "bf16", 1), Kernels(H100, "bf16", 1, Practice(compiled=True))
    assert eager.host_seconds(ops, False) == pytest.approx(100 * constants.dispatch)
    assert compiled.host_seconds(ops, False) == 0
    assert Kernels(load_cluster("local"), "fp32", 1).host_seconds(ops, False) == 0
