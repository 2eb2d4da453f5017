"""What ranks compute and send, against the closed forms."""

from __future__ import annotations

from math import prod

import pytest
from cost_cases import GPT2, LAYOUTS, SMALL, TIED, WORK, attention_flops, flops, multiplied, priced, step_flops, wire

from meshwright.cost.flops import model_flops_per_token
from meshwright.cost.ops import Attention, Gemm
from meshwright.cost.pieces import layer_piece
from meshwright.cost.program import Place, rank_program
from meshwright.cost.traffic import collectives, step_collectives, step_traffic
from meshwright.schedule.stages import rank_shards
from meshwright.spec.huggingface import load_model
from meshwright.spec.kernels import load_kernel_constants
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import parameters
from meshwright.spec.shards import Seat
from meshwright.spec.workload import Workload


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [SMALL, TIED, GPT2], ids=lambda m: m.name)
def test_all_ranks_together_do_the_models_arithmetic(model: Model, layout: str) -> None:
    parsed = parse_layout(layout)
    assert step_flops(model, parsed, Gemm) == 6 * multiplied(model) * WORK.tokens
    assert step_flops(model, parsed, Attention) == attention_flops(model)


def test_shared_key_value_heads_are_computed_again_by_every_replica() -> None:
    keys_and_values = sum(prod(p.shape) for p in parameters(SMALL) if p.role == "kv" and p.decay)
    for layout, replicas in (("tp4", 1), ("tp8", 2)):
        extra = step_flops(SMALL, parse_layout(layout), Gemm) - 6 * multiplied(SMALL) * WORK.tokens
        assert extra == 6 * (replicas - 1) * keys_and_values * WORK.tokens


@pytest.mark.parametrize("layout", ["mb1", "tp4:sp mb1", "dp2 tp2 pp4 mb2"])
@pytest.mark.parametrize("model", [SMALL, GPT2], ids=lambda m: m.name)
def test_recompute_adds_the_forward_of_the_layers_with_the_last_product(model: Model, layout: str) -> None:
    plain, full = parse_layout(layout), parse_layout(f"{layout} ac:full")
    layers = sum(prod(p.shape) for p in parameters(model) if p.decay and p.layer is not None)
    assert step_flops(model, full, Gemm) - step_flops(model, plain, Gemm) == 2 * layers * WORK.tokens
    assert step_flops(model, full, Attention) == pytest.approx(9 / 7 * attention_flops(model))


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "llama-3.2-1b", "opt-1.3b"])
def test_model_flops_are_six_a_multiplying_parameter_and_attention_over_the_square(name: str) -> None:
    model, seq = load_model(name), 1024
    attention = 12 * model.layers * model.heads * model.head_dim * seq
    assert model_flops_per_token(model, seq) == pytest.approx(
        6 * multiplied(model) + attention, rel=2e-3
    )  # norms and biases
    assert model_flops_per_token(model, seq) >= 6 * multiplied(model) + attention


def test_model_flops_of_gpt3_by_hand() -> None:
    """6 x (96 layers of 12 h^2, and the head) + 12 x layers x h x seq."""
    h = 12288
    assert model_flops_per_token(load_model("gpt3-175b"), 2048) == pytest.approx(
        6 * (96 * 12 * h * h + 50257 * h) + 12 * 96 * h * 2048, rel=1e-3
    )


BIG, BIG_WORK = load_model("llama-3-405b"), Workload(seq=8192, global_batch=2048)
ORACLE = parse_layout("dp128:zero1 tp8 pp16 mb1")


def mean_over_stages(layout: Layout, axis: str) -> float:
    m = micro_batches(layout, BIG_WORK)
    each = [rank_program(BIG, layout, BIG_WORK, Place(stage)) for stage in range(layout.pp)]
    return sum(wire(c) * times for p in each for c, times in step_collectives(p, m) if c.axis == axis) / layout.pp


def test_the_worked_example_of_405b() -> None:
    """126 layers, tp 8, pp 16, dp 128, 16 micro-batches of 8192 tokens: 236.8 GB of TP and 18.9 GB of DP (fp32 reduce-scatter, bf16
    all-gather) a rank; 1.07 GB of PP in messages of 33.6 MB under sequence parallel."""
    layers = [layer_piece(BIG, ORACLE, BIG_WORK.seq, None)] * 126
    tp = sum(wire(c) for piece in layers for c in collectives((*piece.forward, *piece.backward))) * 16 / 16
    assert tp == pytest.approx(236.8e9, rel=1e-3)
    assert mean_over_stages(ORACLE, "tp") == pytest.approx(236.8e9, rel=0.02)  # and embedding, head, loss
    assert mean_over_stages(ORACLE, "dp") == pytest.approx(18.9e9, rel=2e-3)
    sp = parse_layout("dp128:zero1 tp8:sp pp16 mb1")
    middle = rank_program(BIG, sp, BIG_WORK, Place(7))
    assert [c.bytes for c in middle.boundary] == [33_554_432] * 2
    assert sum(c.bytes for c in middle.boundary) * 16 == pytest.approx(1.07e9, rel=5e-3)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("mb", [1, 3])
@pytest.mark.parametrize("q", [2, 4])
def test_tensor_parallel_sends_four_all_reduces_a_layer(tp: int, mb: int, q: int) -> None:
    """L x 4 x 2 (t - 1) / t x b s h q; under sequence parallel the forward sends the same bytes as all-gather and reduce-scatter, and the
    backward gathers each column-parallel input once more, since only its shard was kept (Korthikanti et al. 2022, arXiv 2205.05198)."""
    precision = "bf16" if q == 2 else "fp32"
    plain = layer_piece(SMALL, parse_layout(f"tp{tp} mb{mb} {precision}"), WORK.seq, None)
    cut = layer_piece(SMALL, parse_layout(f"tp{tp}:sp mb{mb} {precision}"), WORK.seq, None)
    whole = mb * WORK.seq * SMALL.hidden * q
    share = (tp - 1) / tp
    for direction in ("forward", "backward"):
        assert sum(map(wire, collectives(getattr(plain, direction)))) == pytest.approx(2 * 2 * share * whole)
    assert sum(map(wire, collectives(cut.forward))) == pytest.approx(2 * 2 * share * whole)
    assert sum(map(wire, collectives(cut.backward))) == pytest.approx(2 * 2 * share * whole + 2 * share * whole)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_async_tensor_parallel_sends_and_multiplies_what_sequence_parallel_does(tp: int) -> None:
    whole, pieces = (layer_piece(SMALL, parse_layout(f"tp{tp}:{mode} mb2"), WORK.seq, None) for mode in ("sp", "async"))
    for direction in ("forward", "backward"):
        one, other = getattr(whole, direction), getattr(pieces, direction)
        assert sum(map(wire, collectives(one))) == pytest.approx(sum(map(wire, collectives(other))))
    assert flops(((whole, 1),), Gemm) == flops(((pieces, 1),), Gemm)
    assert whole.saved_bytes == pieces.saved_bytes


def test_async_tensor_parallel_hides_what_fits_under_its_products() -> None:
    estimates = {mode: priced(f"tp4:{mode} dp2", model="llama-3-8b", seq=8192, batch=16) for mode in ("sp", "async")}
    exposed = {mode: e.breakdown["tp exposed"] for mode, e in estimates.items()}
    # What hides still takes its share from the products beside it.
    assert exposed["async"] < exposed["sp"] * (0.5 + load_kernel_constants().beside / 2)
    assert estimates["async"].step_time_s < estimates["sp"].step_time_s
    (hops,) = (c for c in estimates["async"].collectives if c.op == "send")
    assert 0 < hops.exposed_s < hops.time_s


def test_recompute_sends_the_forward_again_but_for_the_last_sum() -> None:
    for layout, again in (
        ("tp4", ["all_reduce"]),
        ("tp4:sp", ["all_gather", "reduce_scatter", "all_gather"]),
        ("tp4:async", ["send"] * 3 * 4),  # there the last sum is one with its product, whose input is what backward needs
    ):
        plain = layer_piece(SMALL, parse_layout(layout), WORK.seq, None)
        full = layer_piece(SMALL, parse_layout(f"{layout} ac:full"), WORK.seq, None)
        assert full.forward == plain.forward
        assert [c.op for c in collectives(full.backward)] == again + [c.op for c in collectives(plain.backward)]


@pytest.mark.parametrize(("zero", "bytes_an_element"), [("", 2 * 4), (":zero1", 4 + 2)])
@pytest.mark.parametrize("dp", [2, 8])
def test_data_parallel_sends_its_parameters_twice(dp: int, zero: str, bytes_an_element: int) -> None:
    """2 (d - 1) / d x P / (t p) x q; reduce-scatter in fp32 and all-gather in bf16 make 6 bytes an element."""
    model, work = load_model("llama-3-8b"), Workload(seq=4096, global_batch=64)
    layout = parse_layout(f"dp{dp}{zero} tp4 pp2 mb1")
    for stage in range(2):
        program = rank_program(model, layout, work, Place(stage))
        held = sum(s.numel for s in rank_shards(model, layout, stage, Seat()))
        sent = sum(wire(c) for c in (*program.gradient_reductions, *program.step_end) if c.axis == "dp")
        assert sent == pytest.approx((dp - 1) / dp * held * bytes_an_element, rel=1e-4)  # alignment, and the token count


@pytest.mark.parametrize(("sp", "part"), [("", 1), (":sp", 4)])
def test_pipeline_sends_an_activation_on_and_a_gradient_back(sp: str, part: int) -> None:
    """2 x m x b s h q, over t under sequence parallel; the two ends send half."""
    layout = parse_layout(f"tp4{sp} pp4 mb2")
    m = micro_batches(layout, WORK)
    whole = 2 * WORK.seq * SMALL.hidden * 2 // part
    for stage in range(4):
        program = rank_program(SMALL, layout, WORK, Place(stage))
        sent = [s for s in step_traffic(program, m) if s.op == "send"]
        directions = 1 if stage in (0, 3) else 2
        assert [(s.axis, s.count, s.bytes) for s in sent] == [("pp", directions * m, directions * m * whole)]


def test_one_rank_sends_nothing() -> None:
    assert step_traffic(rank_program(SMALL, Layout(), WORK, Place()), 16) == ()
