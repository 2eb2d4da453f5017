"""What a layout costs, against the closed forms: arithmetic, traffic, memory, and the seconds that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import log, prod, sqrt

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright import api
from meshwright.cost.collectives import WIRE_FACTOR, CollectiveTimes
from meshwright.cost.estimate import Estimator, estimate
from meshwright.cost.flops import model_flops_per_token
from meshwright.cost.gradients import GradientBuffers
from meshwright.cost.kernels import Kernels, interpolate
from meshwright.cost.memory import away_bytes, stage_memories, state_bytes
from meshwright.cost.offload import OffloadCost
from meshwright.cost.ops import Attention, Collective, Gemm, Op, Piece, Under
from meshwright.cost.peak import ChunkBytes
from meshwright.cost.pieces import layer_piece
from meshwright.cost.program import Place, Program, rank_program
from meshwright.cost.result import Estimate
from meshwright.cost.traffic import collectives, step_collectives, step_traffic
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import rank_shards
from meshwright.spec.catalogue import load_accelerator, load_cluster
from meshwright.spec.cluster import AttentionPoint, Cluster, CollectivePoint, MatmulPoint, Measured
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.kernels import load_kernel_constants
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import parameters
from meshwright.spec.shards import Seat
from meshwright.spec.workload import Workload

WORK = Workload(seq=64, global_batch=16)
SMALL = Model(
    name="small", family="llama", layers=8, hidden=48, ffn=96, vocab=96, heads=8, kv_heads=4, head_dim=6, max_positions=64
)
TIED = replace(SMALL, name="tied", tied=True)
GPT2 = replace(
    SMALL, name="gpt2-like", kv_heads=8, gated=False, rope=None, norm="layernorm", tied=True, qkv_bias=True, out_bias=True, mlp_bias=True,
    windows=(None, 16) * 4, vocab=101,
)  # fmt: skip
LAYOUTS = (
    "mb1",
    "dp4 mb2",
    "tp4 mb2",
    "tp4:sp mb1",
    "pp4 mb2",
    "pp2:gpipe mb4",
    "dp2:zero1 tp2:sp pp4 mb1",
    "dp2 tp2 pp2 mb1 order:pp-dp-cp-tp",
)


def programs(model: Model, layout: Layout, work: Workload = WORK) -> Iterator[Program]:
    """One for each stage and tensor-parallel rank; data-parallel ranks run the same."""
    for stage in range(layout.pp):
        for tp_rank in range(layout.tp):
            yield rank_program(model, layout, work, Place(stage, tp_rank))


def work_of(ops: tuple[Op, ...]) -> Iterator[Op]:
    for op in ops:
        yield from op.work if isinstance(op, Under) else (op,)


def flops(pieces: tuple[tuple[Piece, int], ...], kind: type[Gemm] | type[Attention]) -> float:
    return sum(
        repeat * sum(op.flops for op in work_of((*piece.forward, *piece.backward)) if isinstance(op, kind))
        for piece, repeat in pieces
    )


def step_flops(model: Model, layout: Layout, kind: type[Gemm] | type[Attention]) -> float:
    """Of all ranks together."""
    a_pass = sum(flops(program.pieces, kind) for program in programs(model, layout))
    return a_pass * layout.dp * micro_batches(layout, WORK)


def multiplied(model: Model) -> int:
    """Elements of the matrices that multiply: all but lookup tables, norms and biases; a tied table is the head too."""
    matrices = sum(prod(p.shape) for p in parameters(model) if p.decay and not p.name.startswith("embedding."))
    return matrices + (model.vocab * model.hidden if model.tied else 0)


def attention_flops(model: Model) -> float:
    """Of the whole step under the causal mask: 2 products forward and 5 backward."""
    pairs = 0
    for layer in range(model.layers):
        window = model.window(layer) or WORK.seq
        pairs += sum(min(i + 1, window) for i in range(WORK.seq))
    return 7 * 2 * model.heads * model.head_dim * pairs * WORK.global_batch


def wire(c: Collective) -> float:
    """Bytes a rank sends: what a ring puts through each link; a send puts all."""
    return c.bytes if c.op == "send" else WIRE_FACTOR[c.op] * (c.group_size - 1) / c.group_size * c.bytes


# --- arithmetic


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


# --- traffic, against section 2.5 of the fabric notes: bytes that a rank sends in a step

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


# --- memory


@pytest.mark.parametrize(
    ("precision", "state"),
    [
        ("bf16", (2, 4, 12)),
        ("fp32", (4, 4, 8)),
        ("fp64", (8, 8, 16)),
        ("bf16 params:fp32", (4, 4, 8)),
        ("bf16 grads:bf16", (2, 2, 12)),
        ("fp16 params:fp32 grads:fp16", (4, 2, 8)),
    ],
)
def test_state_bytes_of_one_rank(precision: str, state: tuple[int, int, int]) -> None:
    model = load_model("gpt2")
    program = rank_program(model, parse_layout(precision), WORK, Place())
    held = state_bytes(program, parse_layout(precision))
    for name, bytes_ in zip(("parameters", "gradients", "optimizer"), state, strict=True):
        assert held[name] == pytest.approx(124_439_808 * bytes_, rel=1e-3)  # alignment, and the dtypes of vectors


@pytest.mark.parametrize("dp", [2, 4, 16])
def test_zero_1_cuts_the_optimizer_state_by_dp_and_nothing_else(dp: int) -> None:
    plain, cut = parse_layout(f"dp{dp} tp2 pp2 mb1"), parse_layout(f"dp{dp}:zero1 tp2 pp2 mb1")
    whole, part = (
        next(stage_memories(rank_program(SMALL, x, WORK, Place(1)), x, layout_schedule(x, 2), [1], 0)).categories
        for x in (plain, cut)
    )
    assert part["optimizer"] == pytest.approx(whole["optimizer"] / dp, rel=0.02)
    for name in ("parameters", "gradients"):
        assert part[name] == pytest.approx(whole[name], rel=0.01)
    assert {k: part[k] for k in ("activations", "working", "overhead")} == {
        k: whole[k] for k in ("activations", "working", "overhead")
    }


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("model", [SMALL, GPT2], ids=lambda m: m.name)
def test_sequence_parallel_cuts_what_the_norm_regions_keep_by_tp(model: Model, tp: int) -> None:
    """Four hidden states of b s h q a layer: input and normed input of attention and of the MLP, and the statistics of both norms, in
    fp32; the rest is cut by heads already."""
    plain = layer_piece(model, parse_layout(f"tp{tp} mb2"), WORK.seq, None).saved_bytes
    cut = layer_piece(model, parse_layout(f"tp{tp}:sp mb2"), WORK.seq, None).saved_bytes
    statistics = 2 * 2 * WORK.seq * 4 * (1 if model.norm == "rmsnorm" else 2)
    norm_regions = 4 * 2 * WORK.seq * model.hidden * 2 + statistics
    assert plain - cut == norm_regions - norm_regions // tp
    alone = layer_piece(model, parse_layout("mb2"), WORK.seq, None).saved_bytes
    if model.kv_heads % tp == 0:
        assert cut * tp == alone


def test_full_recompute_keeps_only_the_input_of_a_layer() -> None:
    for layout, tokens in (("tp4 mb2 ac:full", 2 * 64), ("tp4:sp mb2 ac:full", 2 * 64 // 4)):
        piece = layer_piece(SMALL, parse_layout(layout), WORK.seq, None)
        assert piece.saved_bytes == tokens * SMALL.hidden * 2
        plain = layer_piece(SMALL, parse_layout(layout.removesuffix(" ac:full")), WORK.seq, None)
        assert piece.working_bytes == plain.saved_bytes + plain.working_bytes


def test_recompute_of_some_layers_keeps_the_others_whole() -> None:
    """Of one chunk of four layers, of two, and of more than there are."""
    model = replace(SMALL, layers=4)

    def saved(text: str) -> int:
        program = rank_program(model, parse_layout(text), WORK, Place(0))
        return sum(piece.saved_bytes * repeat for piece, repeat in program.pieces)

    for base in ("mb1", "tp2:sp mb1", "pp2 mb1"):
        whole, bare = saved(base), saved(f"{base} ac:full")
        layers = 2 if "pp2" in base else 4
        assert saved(f"{base} ac:full:1") == whole - (whole - bare) // layers
        assert saved(f"{base} ac:full:{layers + 1}") == bare


def test_recompute_of_the_mlp_keeps_its_input_alone() -> None:
    plain, again = (layer_piece(SMALL, parse_layout(text), WORK.seq, None) for text in ("mb2", "mb2 ac:mlp"))
    hidden_units = 4 * SMALL.ffn * 2 * WORK.seq * 2  # gate, up, activated gate, and their product
    assert plain.saved_bytes - again.saved_bytes == hidden_units == again.working_bytes - plain.working_bytes
    repeated = [op.name for op in again.recomputed if isinstance(op, Gemm)]
    assert repeated == ["mlp.gate_up.gate", "mlp.gate_up.up", "mlp.down"]
    both = layer_piece(SMALL, parse_layout("mb2 ac:core+mlp"), WORK.seq, None)
    assert again.saved_bytes - both.saved_bytes == SMALL.heads * 2 * WORK.seq * 4  # the log-sum-exp


def test_weights_of_experts_get_a_gradient_of_every_row() -> None:
    """Rows that do not divide by the experts too: their products are as large as those that make the gradient of the rows."""
    model = load_model("mixtral-8x7b")
    piece = layer_piece(model, parse_layout("mb1"), 1001, None, moe=True)
    gemms = [op for op in piece.backward if isinstance(op, Gemm) and op.name.startswith("moe.experts")]
    weights, rows = (sum(g.flops for g in gemms if g.is_weight_gradient is it) for it in (True, False))
    assert weights == rows > 0


def test_an_uneven_router_costs_the_rank_with_the_fullest_expert() -> None:
    """It gets what this expert has above the mean, on top of its share; where it has all experts it gets no more, only unevenly."""
    model, uneven = load_model("mixtral-8x7b"), 2.5
    for text, extra in (("dp8 ep4 mb1", 1.5 / 2), ("dp8 ep8 etp1 mb1", 1.5), ("dp8 mb1", 0.0)):
        even, full = (layer_piece(model, parse_layout(text), 4096, None, True, x) for x in (1.0, uneven))
        for passes in ("forward", "backward"):
            flops, uneven_flops = (
                sum(op.flops for op in getattr(p, passes) if isinstance(op, Gemm) and op.name.startswith("moe.experts"))
                for p in (even, full)
            )
            assert uneven_flops == pytest.approx(flops * (1 + extra), rel=1e-3)
            sent = [[op.bytes for op in getattr(p, passes) if isinstance(op, Collective)] for p in (even, full)]
            assert max(sent[1], default=0) == pytest.approx(max(sent[0], default=0) * (1 + extra), rel=1e-3)
        assert (full.saved_bytes > even.saved_bytes) is (extra > 0)


@pytest.mark.parametrize("text", ["dp8:zero1 pp4 ep8 mb1", "dp8:zero1 pp4 ep4 etp2 mb1 ac:full", "dp8:zero1 pp4 mb1"])
def test_a_step_is_no_shorter_where_routing_is_less_even(text: str) -> None:
    every = [
        Estimator(load_model("mixtral-8x7b"), load_cluster("h100-superpod"), Workload(4096, 64, x)).estimate(
            parse_layout(text)
        )
        for x in (1.0, 1.25, 2.0, 4.0)
    ]
    steps, peaks = [e.step_time_s for e in every], [e.peak_bytes for e in every]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert peaks == sorted(peaks)
    assert (peaks[0] < peaks[-1]) is ("ep" in text)
    # What runs again is counted over all ranks, however uneven.
    assert [e.hfu / e.mfu for e in every] == pytest.approx([every[0].hfu / every[0].mfu] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "given", "says"), [("gpt2", 1.5, "no experts"), ("mixtral-8x7b", 4.5, "at most all tokens")]
)
def test_a_router_cannot_be_less_even_than_there_are_experts(model: str, given: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Estimator(load_model(model), load_cluster("h100-superpod"), Workload(1024, 8, given)).estimate(
            parse_layout("dp8 mb1")
        )
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="at least 1"):
            Workload(1024, 8, wrong)


@pytest.mark.parametrize("text", ["dp4:zero3 tp2:sp mb1", "dp2:zero3 tp2:sp cp2:ulysses mb1", "dp4:zero3 tp2:sp ep4 mb1"])
@pytest.mark.parametrize("slower", [1, 8, 64])
def test_a_link_does_one_thing_at_a_time(text: str, slower: int) -> None:
    """What ZeRO-3 gathers in a pass shares NVLink with what tensor, context and expert parallel send there: a pass lasts no less than
    both; over links so slow that nothing else lasts, exactly as long."""
    cluster, layout = load_cluster("h100-superpod"), parse_layout(text)
    links = cluster.accelerator.scale_up
    its = {
        name: rate / slower
        for name in ("bandwidth", "pair_bandwidth", "effective_bandwidth")
        if (rate := getattr(links, name)) is not None
    }
    accelerator = cluster.accelerator.model_copy(update={"scale_up": links.model_copy(update=its)})
    cluster = cluster.model_copy(update={"accelerator": accelerator})
    estimator = Estimator(load_model("mixtral-8x7b"), cluster, Workload(4096, 8))
    program = estimator.programs(layout)[0]
    alone = estimator.durations(program.pieces, layout, shared=False)
    passing = estimator.overlap.passing(alone, estimator.overlap.passes(program, layout))
    carried = estimator.pieces.on_links(program.gathers[0]).and_(alone.forward_links)
    assert carried.network == 0
    assert passing.forward >= carried.scale_up * (1 - 1e-9)
    if slower == 64:
        assert passing.forward == pytest.approx(carried.scale_up, rel=0.15)
        assert passing.forward > alone.forward


def test_a_split_backward_hands_on_inputs_and_output_gradients_alone() -> None:
    """Not what was saved; with full recompute that is more than the layers' inputs, which is all that was."""
    for mode, less in (("", True), ("ac:full", False)):
        layout = parse_layout(f"pp2:zb-h1 mb1 {mode} fp32")
        its = ChunkBytes.of(rank_program(SMALL, layout, WORK, Place(0)).chunks[0], layout)
        assert its.deferred > 0
        assert (its.deferred < its.kept) is less


def test_gradients_of_chunks_fill_a_bucket_together() -> None:
    """A bucket of several chunks is whole from the first to come until the last, so more are at once than where one fills each in turn."""
    model, work = load_model("llama-3.2-1b"), Workload(1024, 32)
    one, three = (
        GradientBuffers(rank_program(model, x, work, Place()), x).bytes_of(layout_schedule(x, 8), 0)
        for x in (parse_layout(f"dp4:zero2 tp8:sp {pp} mb1 bf16 grads:bf16") for pp in ("pp2", "pp2x3:interleaved"))
    )
    assert 0 < one < three


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    for text, flights in (("pp4 mb1", (4, 3, 2, 1)), ("pp4:gpipe mb1", (16, 16, 16, 16))):
        layout = parse_layout(text)
        for stage, flying in enumerate(flights):
            program = rank_program(SMALL, layout, WORK, Place(stage))
            (held,) = stage_memories(program, layout, layout_schedule(layout, 16), [stage], overhead=7)
            assert held.categories["activations"] == flying * sum(
                piece.saved_bytes * repeat for piece, repeat in program.pieces
            )
            assert held.categories["overhead"] == 7
            assert held.total_bytes == sum(held.categories.values())


# --- offload


@pytest.mark.parametrize(
    ("layout", "kept"), [("dp4:zero3 mb1 offload:all", 14), ("dp4:zero3 mb1 offload:all params:fp32", 12)]
)
def test_what_is_offloaded_leaves_the_device(layout: str, kept: int) -> None:
    """bf16 parameters, master weights and moments are 2 + 12 bytes a parameter, fp32 parameters and moments 4 + 8."""
    model, parsed = load_model("llama-3-8b"), parse_layout(layout)
    program = rank_program(model, parsed, WORK, Place())
    owned = sum(bucket.owned for bucket in program.buckets)
    away, held = away_bytes(program, parsed), state_bytes(program, parsed)
    assert away == {"host": pytest.approx(kept * owned, rel=1e-3)}  # but for the vectors, which stay
    assert held["parameters"] < 1e-3 * 2 * owned
    assert held["optimizer"] == 4 * len(program.buckets)
    assert held["offload"] < 0.4 * away["host"], "a few buckets of many"


def offload_cost(text: str, cluster: Cluster) -> OffloadCost:
    found = estimate(load_model("llama-3-8b"), cluster, Workload(4096, 64), parse_layout(text)).offload
    assert found is not None
    return found


def test_offload_takes_its_bytes_over_the_link() -> None:
    """24 bytes a parameter for the optimizer, half of them each way at once; all but the first and the last bucket may hide under the
    update, which is far quicker here."""
    cost = offload_cost("dp8:zero1 mb1 offload:optimizer", H100)
    assert cost.read_bytes == cost.written_bytes == cost.kept_bytes
    assert cost.time_s == pytest.approx(cost.kept_bytes / 63e9)
    assert 0.8 * cost.time_s < cost.exposed_s < 1.5 * cost.time_s
    all_ = offload_cost("dp8:zero3 mb1 offload:all", H100)
    owned = all_.kept_bytes / 14
    # Eight micro-batches read the layers for forward and backward, embedding and head once.
    assert all_.read_bytes - 12 * owned == pytest.approx(8 * 2 * owned * 2, rel=0.15)
    assert all_.exposed_s < 0.5 * all_.time_s, "the passes hide their reads"


def test_a_rate_that_is_not_known_is_told() -> None:
    text = "dp8:zero1 mb1 offload:optimizer@file"
    priced = estimate(load_model("llama-3-8b"), H100, Workload(4096, 64), parse_layout(text))
    assert "a lower bound" in priced.evidence["offload"]
    assert "no file_bandwidth of a node of h100-superpod" in priced.evidence["offload"]
    rated = H100.model_copy(update={"node": H100.node.model_copy(update={"file_bandwidth": 16e9})})
    cost = offload_cost(text, rated)
    assert cost.where == "file"
    assert cost.time_s == pytest.approx(2 * cost.kept_bytes / (16e9 / 8)), "eight ranks share the drives"
    assert priced.as_dict()["memory"][0]["away"] == {"file": cost.kept_bytes}
    assert priced.as_dict()["offload"]["kept_bytes"] == cost.kept_bytes


@pytest.mark.parametrize(
    "layout", ["dp8:zero1 mb1 offload:optimizer", "dp8:zero3 mb1 offload:all", "dp8:zero3 mb1 params:fp32"]
)
def test_offload_and_casts_cost_time(layout: str) -> None:
    """And the closed form agrees with the schedule that is played."""
    model, work = load_model("llama-3-8b"), Workload(4096, 64)
    plain = estimate(model, H100, work, parse_layout(" ".join(layout.split()[:2])))
    estimator = Estimator(model, H100, work)
    priced, quick = estimator.estimate(parse_layout(layout)), estimator.played(parse_layout(layout))
    assert priced.step_time_s > plain.step_time_s
    assert quick.step_time_s == pytest.approx(priced.step_time_s)
    assert quick.peak_bytes == priced.peak_bytes


# --- seconds of a kernel

POINTS = st.lists(
    st.tuples(st.floats(1.0, 1e12), st.floats(1e-3, 1e12)), min_size=1, max_size=6, unique_by=lambda p: p[0]
).map(sorted)


@given(POINTS, st.floats(0.1, 1e13))
def test_interpolation_stays_between_its_neighbours(points: list[tuple[float, float]], x: float) -> None:
    y = interpolate(points, x)
    below = [p for p in points if p[0] <= x] or points[:1]
    above = [p for p in points if p[0] >= x] or points[-1:]
    low, high = sorted((below[-1][1], above[0][1]))
    assert low * (1 - 1e-9) <= y <= high * (1 + 1e-9)


def test_interpolation_is_straight_in_log_log_and_flat_beyond_the_ends() -> None:
    points = [(1.0, 10.0), (100.0, 1000.0), (10000.0, 1000.0)]
    assert [interpolate(points, x) for x in (1.0, 100.0, 10000.0)] == pytest.approx([10, 1000, 1000])
    assert interpolate(points, 10.0) == pytest.approx(100)
    assert interpolate(points, sqrt(1e6)) == pytest.approx(1000)
    assert (interpolate(points, 0.01), interpolate(points, 1e9)) == (10, 1000)
    assert interpolate(points[:1], 55.0) == 10


def with_measured(cluster: Cluster, measured: Measured) -> Cluster:
    return cluster.model_copy(update={"measured": measured})


H100, LOCAL = load_cluster("h100-superpod"), load_cluster("local")


def test_a_large_product_runs_at_the_share_of_the_peak_and_a_thin_one_at_the_memorys_rate() -> None:
    kernels, constants = Kernels(H100, "bf16", 1), load_kernel_constants()
    rate = 0.803 * 989e12 * constants.sustained_share
    # 32 x 64 tiles of 256 x 128 on 132 processors: 16 waves, the last of which is half empty.
    wave = 2 * 256 * 128 * (8192 + constants.tile_fill) / (rate / 132)
    assert kernels.gemm(Gemm("large", 8192, 8192, 8192)) == pytest.approx(16 * wave + constants.gap)
    assert kernels.gemm(Gemm("thin", 1, 8192, 8192)) == pytest.approx(
        2 * (8192 + 8192 + 8192**2) / kernels.memory_bandwidth + constants.gap
    )
    assert "published" in kernels.evidence
    assert "formula" in Kernels(load_cluster("mi300x-roce"), "fp32", 1).evidence
    with pytest.raises(UserError, match="h100-sxm has no fp64 rate; it has fp32,"):
        _ = Kernels(H100, "fp64", 1).peak_flops


def test_measured_rates_replace_the_formula() -> None:
    matmul = tuple(
        MatmulPoint(precision="bf16", m=n, n=n, k=n, active=1, flops_per_s=rate) for n, rate in ((64, 1e12), (4096, 4e14))
    )
    attention = (
        AttentionPoint(precision="bf16", flops=1e9, active=1, forward_flops_per_s=1e14, backward_flops_per_s=5e13),
    )
    cluster = with_measured(H100, Measured(source="my bench", matmul=matmul, attention=attention, memory_bandwidth=1e12))
    kernels = Kernels(cluster, "bf16", 1)
    assert kernels.gemm(Gemm("measured", 4096, 4096, 4096)) == pytest.approx(2 * 4096**3 / 4e14)
    forward, backward = (Attention("a", 1, 8, 1024, 64, 64, None, backward=b) for b in (False, True))
    assert kernels.attention(forward) == pytest.approx(forward.flops / 1e14)
    assert kernels.attention(backward) == pytest.approx(backward.flops / 5e13)
    assert Kernels(cluster, "bf16", H100.node.accelerators).memory_bandwidth == 1e12
    assert kernels.evidence == "measured: my bench"
    assert "measured" not in Kernels(cluster, "fp32", 1).evidence


# --- seconds of a collective


def times(cluster: Cluster) -> CollectiveTimes:
    return CollectiveTimes(cluster, load_collective_constants())


SWITCHED = st.sampled_from(("h100-superpod", "a100-superpod", "gb200-nvl72", "aws-p5", "h100-roce-rail", "local"))
RING = st.sampled_from(("all_reduce", "all_gather", "reduce_scatter"))
BYTES = st.integers(1, 10**10)


@given(
    SWITCHED,
    st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "send")),
    st.integers(2, 64),
    st.sampled_from((1, 2, 8)),
    BYTES,
    BYTES,
)
def test_more_bytes_never_take_less_time(cluster: str, op: str, n: int, stride: int, one: int, other: int) -> None:
    t = times(load_cluster(cluster))
    less, more = sorted((one, other))
    assert t.seconds(Collective("tp", op, n, stride, less)) <= t.seconds(Collective("tp", op, n, stride, more))  # type: ignore[arg-type]


@given(SWITCHED, RING, st.integers(2, 128), st.integers(2, 128), st.sampled_from((1, 2, 8)), BYTES)
def test_more_ranks_never_take_less_time(cluster: str, op: str, one: int, other: int, stride: int, nbytes: int) -> None:
    """But for an all-reduce that the switch sums: 5 ranks of 8 are quicker than 4, which it leaves to the ring."""
    loaded = load_cluster(cluster)
    assume(op != "all_reduce" or not loaded.accelerator.scale_up.sums_in_switch)
    t = times(loaded)
    fewer, more = sorted((one, other))
    assert t.seconds(Collective("tp", op, fewer, stride, nbytes)) <= t.seconds(
        Collective("tp", op, more, stride, nbytes)
    ) * (1 + 1e-12)  # type: ignore[arg-type]


@given(SWITCHED, st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "send")), st.integers(2, 8), BYTES)
def test_the_network_is_slower_than_scale_up(cluster: str, op: str, n: int, nbytes: int) -> None:
    loaded = load_cluster(cluster)
    t, domain = times(loaded), loaded.fabric.domain
    if loaded.node.nics:
        inside, across = (Collective("tp", op, n, stride, nbytes) for stride in (1, domain))  # type: ignore[arg-type]
        assert (t.link(inside), t.link(across)) == ("scale-up" if n <= domain else "network", "network")
        assert t.seconds(inside) < t.seconds(across)


def test_a_large_all_reduce_by_hand() -> None:
    """2 (n - 1) / n x S over the ring's rate: 370.8 GB/s inside a DGX H100, 0.97 x 50 GB/s of a rank's own NIC between nodes.
    Inside, each rank also copies its own n-th part at about twice that rate, and the switch sums an all-reduce of 8."""
    t = times(H100)
    inside = 0.98 * 370.8e9
    gathered, reduced = (Collective("tp", op, 8, 1, 10**10) for op in ("all_gather", "all_reduce"))  # type: ignore[arg-type]
    assert t.seconds(gathered) == pytest.approx((7 / 8 + 0.49 / 8) * 1e10 / inside, rel=0.01)
    assert t.seconds(reduced) == pytest.approx((2 * 7 / 8 + 0.49 / 8) * 1e10 / (1.3 * 370.8e9), rel=0.01)
    four = Collective("tp", "all_reduce", 4, 1, 10**10)
    assert t.seconds(four) == pytest.approx((2 * 3 / 4 + 0.49 / 4) * 1e10 / inside, rel=0.01)
    assert t.seconds(Collective("dp", "all_reduce", 16, 8, 10**10)) == pytest.approx(2 * 15 / 16 * 1e10 / 48.5e9, rel=0.01)
    assert t.seconds(Collective("dp", "all_gather", 16, 8, 10**10)) == pytest.approx(15 / 16 * 1e10 / 48.5e9, rel=0.01)
    # Eight members in a node share its eight NICs: of a ring the scale-up links are the narrower, of a sum in each node's switch those.
    assert t.seconds(Collective("dp", "all_gather", 64, 1, 10**10)) == pytest.approx(63 / 64 * 1e10 / 370.8e9, rel=0.04)
    assert t.seconds(Collective("dp", "all_reduce", 64, 1, 10**10)) == pytest.approx(
        2 * 63 / 64 * 1e10 / (8 * 48.5e9), rel=0.01
    )
    # Two nodes only exchange, so that the switches are the narrower.
    two = Collective("dp", "all_reduce", 16, 1, 10**10)
    assert t.seconds(two) == pytest.approx(2 * 15 / 16 * 1e10 / (1.3 * 370.8e9), rel=0.01)
    # Of few bytes over many nodes, a tree waits for their logarithm and PAT for less than a ring's steps.
    for op, way in (("all_reduce", "tree"), ("all_gather", "pat")):
        small = Collective("dp", op, 512, 8, 2**20)  # type: ignore[arg-type]
        assert t.algorithm(small) == way
        assert t.algorithm(small._replace(bytes=2**36)) == "ring"
    assert t.seconds(Collective("dp", "all_reduce", 512, 8, 2**20)) == pytest.approx(
        14e-6 + 2 * 9 * 8.5e-6 + 2 * 2**20 / (0.78 * 48.5e9), rel=0.01
    )


def test_rings_of_cards_behind_several_sockets_have_the_rates_that_were_measured() -> None:
    """From the catalogue by ranks; between them a straight line in log-log."""
    l40s = load_cluster("h100-superpod").model_copy(update={"accelerator": load_accelerator("l40s")})
    for ranks, rate in ((2, 19.6e9), (4, 4.8e9), (8, 1.5e9), (6, 4.8e9 * (1.5 / 4.8) ** (log(6 / 4) / log(2)))):
        seconds = times(l40s).seconds(Collective("tp", "all_gather", ranks, 1, 10**10))
        assert seconds == pytest.approx((ranks - 1) / ranks * 1e10 / rate, rel=1e-3)


def test_a_pair_on_a_mesh_has_one_link_and_no_call_is_quicker_than_its_floor() -> None:
    t = times(load_cluster("mi300x-roce"))
    assert t.seconds(Collective("tp", "all_reduce", 2, 1, 10**10)) == pytest.approx(1e10 / (0.98 * 0.74 * 64e9), rel=0.01)
    a100 = times(load_cluster("a100-superpod"))
    least = [x.seconds(Collective("tp", "all_reduce", 2, 1, 1)) for x in (a100, times(H100))]
    assert least == pytest.approx([8.05e-6 + 2 * 1.17e-6, 0.65 * (8.05e-6 + 2 * 1.17e-6)], rel=1e-4)
    assert times(H100).seconds(Collective("dp", "all_reduce", 2, 8, 1)) == 62e-6


def measured_at(cluster: Cluster, *ranks: int) -> Cluster:
    """10 us and 100 GB/s whatever the group, for messages of 1 kB, 1 MB and 100 MB."""
    points = tuple(
        CollectivePoint(op=op, ranks=n, bytes=nbytes, seconds=1e-5 + nbytes / 1e11)  # type: ignore[arg-type]
        for op in ("all_reduce", "p2p")
        for n in ranks
        for nbytes in (10**3, 10**6, 10**8)
    )
    return with_measured(cluster, Measured(source="my bench", collectives=points))


def test_measured_points_are_used_where_there_are_any() -> None:
    t = times(measured_at(H100, 2, 8))
    for n in (2, 8):
        for nbytes in (10**3, 10**6, 10**8):
            assert t.seconds(Collective("tp", "all_reduce", n, 1, nbytes)) == pytest.approx(1e-5 + nbytes / 1e11)
    assert t.seconds(Collective("pp", "send", 2, 1, 10**6)) == pytest.approx(2e-5)
    between = t.seconds(Collective("tp", "all_reduce", 8, 1, 10**7))
    assert 2e-5 < between < 1e-5 + 1e-3
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 10**9)) == pytest.approx(10 * (1e-5 + 1e-3)), (
        "beyond the largest: its rate"
    )
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 1)) == pytest.approx(1e-5 + 1e-8), (
        "below the smallest: its latency"
    )
    gather = Collective("tp", "all_gather", 8, 1, 10**6)
    assert t.seconds(gather) == times(H100).seconds(gather), "not measured"
    assert t.evidence == "measured: my bench"
    assert "formula" in times(H100).evidence


@given(st.integers(2, 8), st.integers(2, 8), BYTES)
def test_between_measured_group_sizes_more_ranks_never_take_less_time(one: int, other: int, nbytes: int) -> None:
    t = times(measured_at(H100, 2, 8))
    fewer, more = sorted((one, other))
    assert t.seconds(Collective("tp", "all_reduce", fewer, 1, nbytes)) <= t.seconds(
        Collective("tp", "all_reduce", more, 1, nbytes)
    ) * (1 + 1e-9)


@pytest.mark.parametrize("op", ["all_reduce", "send"])
def test_what_was_measured_inside_a_node_says_nothing_of_the_network(op: str) -> None:
    across = Collective("dp", op, 8, 8, 10**8)  # type: ignore[arg-type]
    assert times(measured_at(H100, 2, 8)).seconds(across) == times(H100).seconds(across)


def test_a_point_of_no_bytes_is_the_latency() -> None:
    points = [CollectivePoint(op="all_reduce", ranks=8, bytes=n, seconds=t) for n, t in ((0, 1e-5), (10**6, 1e-4))]
    t = times(with_measured(H100, Measured(source="x", collectives=tuple(points))))
    assert t.seconds(Collective("tp", "all_reduce", 8, 1, 1)) == pytest.approx(1e-5)
    assert 1e-5 < t.seconds(Collective("tp", "all_reduce", 8, 1, 10**3)) < 1e-4


def test_a_group_beyond_the_last_link_is_refused() -> None:
    """A domain of 8 without NICs: sixteen ranks have nothing to meet over."""
    fabric = H100.fabric.model_copy(update={"kind": "none", "transport": "none"})
    alone = H100.model_copy(
        update={"node": H100.node.model_copy(update={"nics": 0, "nic_bandwidth": 0.0}), "fabric": fabric}
    )
    with pytest.raises(UserError, match=r"h100-superpod has no NICs.*16 ranks of dp.*domain of 8"):
        times(alone).seconds(Collective("dp", "all_reduce", 16, 1, 100))


# --- the whole step

LLAMA_70B = load_model("llama-3-70b")


def priced(
    layout: str,
    model: str | Model = "llama-3-8b",
    cluster: str | Cluster = "h100-superpod",
    seq: int = 2048,
    batch: int = 16,
) -> Estimate:
    return api.estimate(model=model, cluster=cluster, seq=seq, global_batch=batch, layout=layout)


def test_the_json_of_an_estimate_has_its_keys() -> None:
    e = priced("dp2:zero1 tp2:sp pp2 mb1 ac:full")
    d = json.loads(json.dumps(e.as_dict()))
    scalars = ("layout", "world", "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "hfu", "bubble", "fits")
    assert set(scalars) | {"memory", "collectives"} <= set(d)
    assert (d["layout"], d["world"], d["fits"]) == ("dp2:zero1 tp2:sp pp2:1f1b mb1 ac:full bf16", 8, True)
    assert (d["mfu"], d["hfu"]) == (e.mfu, e.hfu)
    assert d["tokens_per_s"] == pytest.approx(2048 * 16 / d["step_time_s"])
    assert d["tokens_per_s_per_gpu"] == pytest.approx(d["tokens_per_s"] / 8)
    for stage, row in enumerate(d["memory"]):
        assert row["stage"] == stage
        assert row["total_bytes"] == sum(row["categories"].values())
        assert set(row["categories"]) == {"parameters", "gradients", "optimizer", "activations", "working", "overhead"}
    for row in d["collectives"]:
        assert {"axis", "op", "count", "bytes", "group_size", "link", "time_s", "exposed_s"} <= set(row)
        assert 0 <= row["exposed_s"] <= row["time_s"] * (1 + 1e-9)
        assert row["link"] in ("scale-up", "network")
    assert {row["axis"] for row in d["collectives"]} == {"dp", "tp", "pp"}


def test_mfu_is_the_models_arithmetic_over_the_peak() -> None:
    e = priced("dp2 tp4 mb1")
    peak = H100.accelerator.peak_flops["bf16"]
    assert e.mfu == pytest.approx(
        model_flops_per_token(load_model("llama-3-8b"), 2048) * 2048 * 16 / (e.step_time_s * 8 * peak)
    )
    assert 0.2 < e.mfu < 0.75
    assert e.hfu == e.mfu


@pytest.mark.parametrize("layout", ["dp8", "tp4 pp2"])
def test_hardware_flops_count_what_is_recomputed_and_no_more(layout: str) -> None:
    """PaLM's hardware utilisation (arXiv 2204.02311, appendix B) adds what is repeated: all but the head."""
    e = priced(f"{layout} mb1 ac:full")
    assert e.mfu < priced(f"{layout} mb1").mfu
    model = load_model("llama-3-8b")
    repeated = sum(prod(p.shape) for p in parameters(model) if p.decay and p.layer is not None)
    attention = 12 * model.layers * model.heads * model.head_dim * 2048
    expected = (6 * multiplied(model) + 2 * repeated + attention * 4 / 3) / (6 * multiplied(model) + attention)
    assert e.hfu / e.mfu == pytest.approx(expected, rel=5e-3)
    half = priced(f"{layout} mb1 ac:full:{model.layers // parse_layout(layout).pp // 2}")
    assert half.hfu / half.mfu - 1 == pytest.approx((e.hfu / e.mfu - 1) / 2)
    assert e.mfu < half.mfu


def test_the_bubble_shrinks_with_micro_batches_and_is_nothing_without_a_pipeline() -> None:
    bubbles = [priced("pp4 tp2 mb1", batch=batch).bubble for batch in (4, 8, 16, 64)]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[-1] < bubbles[0] / 2  # what stays is the head on the last stage
    assert bubbles[0] == pytest.approx(3 / 7, abs=0.15)
    assert priced("dp4 tp2 mb1").bubble == pytest.approx(0, abs=1e-12)


def test_what_does_not_fit_says_so() -> None:
    e = priced("dp8 mb1")
    assert not e.fits
    assert e.peak_bytes > e.memory_limit_bytes == H100.accelerator.memory_bytes
    assert priced("dp8:zero1 tp1 mb1").peak_bytes < e.peak_bytes


def test_stages_with_other_windows_are_priced_apart() -> None:
    """Four stages of one layer: the third has full attention, its neighbours a window."""
    model = replace(SMALL, layers=4, windows=(16, 16, None, 16), max_positions=2**18)
    e = priced("pp4 mb1", model=model, seq=2**18, batch=8)
    assert e.timeline is not None
    busy = [e.timeline.busy(stage) for stage in range(4)]
    assert busy[2] > busy[1] * 1.05


def test_what_cannot_be_priced_is_refused() -> None:
    for layout, said in (
        ("fp4", "h100-sxm has no fp4 rate"),
        ("tp5", "tp 5 does not divide"),
        ("pp33", "32 layers"),
        ("dp3", "does not divide 16"),
    ):
        with pytest.raises(UserError, match=said):
            priced(layout)
    with pytest.raises(UserError, match="local is one node of 4 ranks"):
        priced("dp8 mb1", model="llama-tiny", cluster="local", seq=64)
    with pytest.raises(UserError, match="8 ranks, but 16 are given"):
        api.estimate(model="gpt2", cluster="h100-superpod", seq=64, global_batch=8, layout="dp8", gpus=16)
    with pytest.raises(UserError, match="llama-3-8b is dense"):
        priced("dp8 ep2")
    with pytest.raises(UserError, match="not a multiple of 4 stages"):
        priced("dp8 pp4x2:interleaved mb1")


@pytest.mark.parametrize("layout", ["dp4 mb1 fp32", "pp4 mb1 fp32", "tp4 mb1 fp32"])
def test_ranks_that_share_cores_are_no_quicker_than_the_cores(layout: str) -> None:
    """On the local cluster two ranks compute at once: four ranks cannot be four times as quick as one."""
    one, four = (priced(x, model="llama-small", cluster="local", seq=256, batch=32) for x in ("mb1 fp32", layout))
    assert LOCAL.node.compute_slots == 2
    assert one.step_time_s / 2 < four.step_time_s < one.step_time_s * 1.5
    assert not times(LOCAL).hides
    assert times(H100).hides


@pytest.mark.parametrize(
    ("layout", "stride"),
    [
        ("dp4 tp2", 2),
        ("dp2 cp2 tp2", 2),
        ("cp4 tp2", 2),
        ("dp4 tp2 order:dp-tp-cp-pp", 1),
        ("dp2 pp4 order:pp-tp-cp-dp", 4),
        ("dp10 tp4 cp2 order:cp-tp-dp-pp", 4),  # two neighbours, then eight further on: two of a domain of eight
    ],
)
def test_the_ranks_of_a_gradient_are_as_far_apart_as_the_order_puts_them(layout: str, stride: int) -> None:
    program = rank_program(load_model("llama-tiny"), parse_layout(layout), Workload(128, 40), Place(0))
    assert {c.stride for c in program.gradient_reductions} == {stride}


def test_a_pipeline_waits_for_its_slowest_hop() -> None:
    """Stages of four ranks: every second hop leaves a node of eight, and all wait for it."""
    times = CollectiveTimes(load_cluster("h100-superpod"), load_collective_constants())
    inside, across = (times.seconds(Collective("pp", "send", stages, 4, 2**24)) for stages in (2, 4))
    assert across == times.seconds(Collective("pp", "send", 2, 8, 2**24)) > 2 * inside
