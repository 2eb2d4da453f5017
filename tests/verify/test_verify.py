"""`meshwright verify` proves what is right, finds what is wrong and names its operator and its axis."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
from sabotage import (
    doubled_gradients_between_stages,
    labels_of_another_micro_batch,
    no_gradient_reduction,
    no_sum_of_row_parallel,
    no_sum_of_shared_latents,
)

from meshwright.cli.main import main
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import catalogue_models, load_model
from meshwright.spec.legality import check_layout, refuse_unrunnable_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import count_parameters
from meshwright.testing import pool
from meshwright.verify.check import Verifier
from meshwright.verify.difference import PHASES, worst_by_operator
from meshwright.verify.held import held_gradients
from meshwright.verify.ranks import Sabotage, Step, run_step
from meshwright.verify.shrink import shrink

# --- the command


def test_the_command_prints_json_and_ends_well() -> None:
    command = [sys.executable, "-m", "meshwright", "verify", "--layout", "dp2 tp2:sp", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
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
        (("--layout", "dp2 fp8"), "in fp64 or fp32"),
        (("--layout", "dp2", "--precision", "fp16"), "in fp64 or fp32"),
        (("--layout", "dp128"), "at most 64"),
        (("--layout", "dp2 tp2 ep8"), "ep 8 x etp 1 = 8"),
        (("--layout", "pp2 stages:3-5"), "stages:3-5 holds 8 layers, but llama-3-8b has 32"),
        (("--layout", "dp2", "--batch", "hot"), "batch of llama-3-8b"),
        (("--layout", "dp2", "--count", "7"), "--count 7 is of the matrix"),
        (("--matrix", "--batch", "hot"), "--batch hot is of one layout"),
        (("--matrix", "--ranks", "1"), "2 to 64 ranks, got 1"),
        ((), "either --layout or --matrix"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["meshwright", "verify", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


# --- what is wrong is found


class Found(NamedTuple):
    """What a Difference says, but for the size of the error."""

    phase: str
    operator: str
    cause: str | None
    sent: tuple[str, ...]
    axes: tuple[str, ...]


MISSING_DP, MISSING_TP = (f"it would be right summed over {axis}: that sum is missing" for axis in ("dp", "tp"))


@pytest.mark.parametrize(
    ("model", "layout", "broken", "expected"),
    [
        (
            "llama-3-8b",
            "dp2 tp2 fp64",
            no_gradient_reduction,
            Found("parameter", "head.weight", MISSING_DP, (), ("dp",)),
        ),
        (
            "llama-3-8b",
            "tp2 pp2 fp64",
            no_sum_of_row_parallel,
            Found("forward", "layers.0.attention.out", MISSING_TP, (), ("tp",)),
        ),
        (
            "deepseek-v3",
            "dp2 tp2 fp64",
            no_sum_of_shared_latents,
            Found("backward", "layers.3.attention.q_down", MISSING_TP, (), ("tp",)),
        ),
        (
            "llama-3-8b",
            "dp2 pp2 fp64",
            labels_of_another_micro_batch,
            Found("backward", "head", None, ("send over pp",), ("pp",)),
        ),
        (
            "llama-3-8b",
            "tp2 pp2 fp64",
            doubled_gradients_between_stages,
            Found("backward", "layers.0.output", "it is 2 times what it should be, on every rank", (), ("pp",)),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_found_at_its_operator_and_axis(
    model: str, layout: str, broken: Sabotage, expected: Found
) -> None:
    result = Verifier(load_model(model), pool(), broken).verify(parse_layout(layout))
    found = result.first_difference
    assert not result.ok
    assert found is not None
    assert Found(found.phase, found.operator, found.cause, found.sent, found.axes) == expected
    assert found.error > 1e-3


WATCHED = [
    ("deepseek-v3", "tp2:sp cp2:ring ep2 ac:full fp64"),
    ("gpt2", "pp2 tp2 fp64"),
    ("qwen2-7b", "dp2 cp2:ulysses tp2:async fp64"),
]


@pytest.mark.parametrize(("model", "layout"), WATCHED)
def test_no_operator_is_blamed_where_all_is_right(model: str, layout: str) -> None:
    verifier = Verifier(load_model(model), pool())
    step = Step(*shrink(verifier.model, parse_layout(layout)), watched=True)
    reference, reports = verifier.run(step)
    for phase in PHASES:
        errors = worst_by_operator(step, phase, reference, reports)
        assert len(errors) > 12
        assert max(errors.values()) <= 1e-9, errors
        assert {name.split(".")[0] for name in errors} >= {"layers", "norm", "head"}


@pytest.mark.parametrize(("precision", "measure"), [("fp64", "bias"), ("fp32", "weight")])
def test_a_bias_is_measured_against_its_weight_in_fp32_alone(precision: str, measure: str) -> None:
    step = Step(*shrink(load_model("qwen2-7b"), parse_layout(precision)))
    reference = pool().run(run_step, 1, step)[0]
    gradients = {shard.name: gradient for shard, gradient in reference.gradients}
    name = "layers.0.attention.qkv.k"
    assert gradients[f"{name}.weight"].abs().max() > 2 * gradients[f"{name}.bias"].abs().max(), "so the measures differ"
    wrong = replace(reference, gradients=[(s, g + 0.01 if s.name == f"{name}.bias" else g) for s, g in reference.gradients])
    errors = {shard.name: held.error for shard, held in held_gradients(step, reference, [wrong])}
    assert errors[f"{name}.bias"] == pytest.approx(0.01 / float(gradients[f"{name}.{measure}"].abs().max()), rel=1e-5)
    assert [other for other, error in errors.items() if error] == [f"{name}.bias"]


# --- shrinking


@pytest.mark.parametrize("layout", ["dp2", "tp2:sp pp2", "cp4:ring2xulysses2 tp2", "pp4x2:interleaved"])
@pytest.mark.parametrize("name", catalogue_models())
def test_a_shrunk_model_is_small_and_keeps_its_structure(name: str, layout: str) -> None:
    model, parsed = load_model(name), parse_layout(layout)
    try:
        refuse_unrunnable_model(model)
        small, workload, shrunk = shrink(model, parsed)
    except UserError:
        return  # the layout cannot split the real one: shrinking must not make it legal
    check_layout(shrunk, small, workload)
    assert shrunk == parsed
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


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("llama-3.2-1b", "pp4 stages:5-3-3-5", (2, 1, 1, 2)),
        ("qwen3-8b", "pp2x2:interleaved stages:8-11-7-10", (2, 4, 1, 3)),
        ("llama-3.2-1b", "pp2 stages:8-8", (1, 1)),
        ("deepseek-v3", "pp2 stages:30-31", (1, 3)),  # three dense layers, then sparse ones
        ("qwen3-8b", "pp4 ac:full:2 stages:9-8-9-10", (2, 1, 2, 3)),
        ("llama-tiny", "pp2 stages:1-3", (1, 2)),
    ],
)
def test_uneven_stages_shrink_in_their_order(name: str, layout: str, expected: tuple[int, ...]) -> None:
    small, _, shrunk = shrink(load_model(name), parse_layout(layout))
    assert shrunk.stage_layers == expected
    assert small.layers == sum(expected)


@pytest.mark.parametrize(
    ("layout", "layers", "recomputed"),
    [
        ("pp2 ac:full:4", 3, 1),  # some of a stage, so some of the larger shrunk one
        ("pp2 ac:full:4 stages:16-16", 4, 1),
        ("pp4 ac:full:8 stages:12-8-6-6", 7, 2),  # 3-2-1-1
        ("pp2 ac:full:16", 2, 1),  # all
        ("pp2 ac:full:99", 2, 1),
        ("ac:selective:31", 2, 1),
        ("ac:full", 2, None),
    ],
)
def test_recompute_of_some_layers_stays_of_some(layout: str, layers: int, recomputed: int | None) -> None:
    small, _, shrunk = shrink(load_model("llama-3-8b"), parse_layout(layout))
    assert (small.layers, shrunk.recompute_layers) == (layers, recomputed)
