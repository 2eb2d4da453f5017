"""What a whole step takes, from the seconds of what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest
from cost_cases import H100, LOCAL, SMALL, multiplied, priced, times

from meshwright import api
from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.estimate import Estimator
from meshwright.cost.flops import model_flops_per_token
from meshwright.cost.ops import Collective, Gemm
from meshwright.cost.pieces import layer_piece
from meshwright.cost.program import Place, rank_program
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import parameters
from meshwright.spec.workload import Workload


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
