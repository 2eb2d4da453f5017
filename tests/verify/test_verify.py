"""`meshwright verify` proves what is right, finds what is wrong and names its axis; its layouts cover every pair of modes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

import pytest

from meshwright.parallel import data, tensor
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import catalogue_models, load_model
from meshwright.spec.legality import check_layout, refuse_unrunnable_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import count_parameters
from meshwright.testing import pool
from meshwright.verify.check import Verifier
from meshwright.verify.layouts import draw_layouts, features, legal_layouts, uncovered
from meshwright.verify.run import verify
from meshwright.verify.shrink import shrink

DENSE, SPARSE = "qwen3-8b", "deepseek-v3"
CI_LAYOUTS, PARITY_LAYOUTS = 0, 160
"""Of each model; a covering set in any case."""


def forget_the_gradient_reduction() -> None:
    """Of data parallel alone."""
    data.FlatBucket.reduce = lambda bucket: (bucket.clear_missing(), data.Reduction(None))[1]  # type: ignore[method-assign]


def forget_the_sum_of_row_parallel() -> None:
    tensor.all_reduce_forward_identity_backward = lambda x, group: x  # type: ignore[assignment]


# --- the command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshwright", "verify", *arguments], capture_output=True, text=True, timeout=200
    )


def test_the_command_prints_json_and_ends_well() -> None:
    done = run_command("--layout", "dp2 tp2:sp", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert result["ok"]
    assert result["max_relative_error"] <= 1e-9
    assert {"loss_error", "grad_norm_error", "worst_parameter", "collectives"} <= result.keys()
    assert {(c["axis"], c["op"]) for c in result["collectives"]} >= {("dp", "all_reduce"), ("tp", "reduce_scatter")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layout", "tp3"), "tp 3 does not divide"),
        (("--layout", "dp2 ep2", "--model", "llama-3-8b"), "llama-3-8b is dense"),
        (("--layout", "ep3 dp3"), "ep 3 does not divide the 8 experts"),
        (("--layout", "cp4:ulysses tp16"), "ulysses"),
        (("--layout", "dp2 fp8", "--precision", "fp16"), "precision to verify in"),
        (("--layout", "dp2 tp2 ep8"), "ep 8 x etp 1 = 8"),
        ((), "either --layout or --matrix"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- what is wrong is found


def test_a_missing_gradient_reduction_is_found_in_dp() -> None:
    result = verify("dp2 tp2", sabotage=forget_the_gradient_reduction)
    assert not result.ok
    assert result.first_difference is not None
    assert result.first_difference.module.endswith("backward")
    assert result.first_difference.axes == ("dp",)


def test_a_missing_sum_is_found_in_tp_at_the_first_layer() -> None:
    result = verify("dp2 tp2 pp2", sabotage=forget_the_sum_of_row_parallel)
    assert not result.ok
    assert result.first_difference is not None
    assert result.first_difference.module in ("embedding, forward", "layers.0, forward")
    assert result.first_difference.axes == ("tp",)


# --- shrinking


@pytest.mark.parametrize("layout", ["dp2", "tp2:sp pp2", "cp4:ring2xulysses2 tp2", "pp4x2:interleaved"])
@pytest.mark.parametrize("name", catalogue_models())
def test_a_shrunk_model_is_small_and_keeps_its_structure(name: str, layout: str) -> None:
    model, parsed = load_model(name), parse_layout(layout)
    try:
        refuse_unrunnable_model(model)
        small, workload = shrink(model, parsed)
    except UserError:
        return  # the layout cannot split the real one: shrinking must not make it legal
    check_layout(parsed, small, workload)
    assert count_parameters(small).total < 3_000_000
    assert small.heads // small.kv_heads == model.heads // model.kv_heads
    kinds = {(model.window(i) is None, model.is_moe(i)) for i in range(model.layers)}
    assert {(small.window(i) is None, small.is_moe(i)) for i in range(small.layers)} == kinds
    for field in ("norm", "activation", "gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "sinks", "tied", "rope"):
        assert getattr(small, field) == getattr(model, field)
    assert (small.latent is None) == (model.latent is None)
    if model.experts is not None and small.experts is not None:
        assert small.experts.count / small.experts.top_k >= model.experts.count / model.experts.top_k
        assert small.experts.groups == model.experts.groups


# --- layouts


@pytest.mark.parametrize("name", [DENSE, SPARSE])
def test_drawn_layouts_cover_every_pair_and_are_distinct(name: str) -> None:
    model = load_model(name)
    drawn = draw_layouts(model, CI_LAYOUTS)
    assert len(set(drawn)) == len(drawn)
    assert uncovered(drawn, legal_layouts(model, 8, 0, "fp64")) == set()
    assert any(feature[0] == "triple" for layout in drawn for feature in features(layout))
    assert uncovered(drawn[:-1], drawn) != set(), "the last one is needed, so the check can fail"


@lru_cache
def verifier(name: str) -> Verifier:
    return Verifier(load_model(name), pool())


def parity_cases() -> list[object]:
    """In CI a covering set of the sparse model in fp64; under `make parity` at least twice as many layouts, in both precisions."""
    out = []
    for name in (DENSE, SPARSE):
        covering = {str(layout) for layout in draw_layouts(load_model(name), CI_LAYOUTS)} if name == SPARSE else set()
        for precision in ("fp64", "fp32"):
            for layout in draw_layouts(load_model(name), PARITY_LAYOUTS, precision=precision):  # type: ignore[arg-type]
                marks = [] if str(layout) in covering else [pytest.mark.parity]
                out.append(pytest.param(name, str(layout), marks=marks))
    return out


@pytest.mark.parametrize(("name", "layout"), parity_cases())
def test_parity(name: str, layout: str) -> None:
    result = verifier(name).verify(parse_layout(layout), explain=False)
    assert result.ok, f"{result.worst_parameter}: {result.max_relative_error:.1e}; loss {result.loss_error:.1e}"
