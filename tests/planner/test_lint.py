"""Every rule fires where its anti-pattern is and is silent where it is not; its price is the estimator's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshwright import api
from meshwright.cost.estimate import Estimator
from meshwright.planner.lint import RULES, Linted
from meshwright.planner.rules.case import WORTH, Case, Finding
from meshwright.planner.rules.placement import hops_off_rail
from meshwright.planner.rules.reshape import eased, moved, reshaped
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

LLAMA: dict[str, Any] = {"model": "llama-3-70b", "cluster": "h100-superpod", "seq": 4096, "global_batch": 1280}
SMALL: dict[str, Any] = {"model": "llama-3-8b", "cluster": "h100-superpod", "seq": 4096, "global_batch": 64}
MIXTRAL: dict[str, Any] = {"model": "mixtral-8x7b", "cluster": "h100-superpod", "seq": 4096, "global_batch": 128}
GPT2: dict[str, Any] = {"model": "gpt2", "cluster": "h100-superpod", "seq": 1024, "global_batch": 256}


def linted(problem: dict[str, Any], layout: str, **habits: Any) -> Linted:
    return api.lint(**problem, layout=layout, **habits)


def found(problem: dict[str, Any], layout: str, rule: str, **habits: Any) -> Finding | None:
    return next((f for f in linted(problem, layout, **habits).findings if f.rule == rule), None)


FIRES = [
    ("tensor parallel across nodes", LLAMA, "dp10:zero1 tp16:sp pp4 mb1", {}, "dp20:zero1 tp8:sp pp4 mb1", {}),
    ("tensor parallel across nodes", LLAMA, "dp20:zero1 tp8:sp pp4 mb1 order:dp-tp-cp-pp", {}, "dp20:zero1 tp8:sp pp4 mb1", {}),
    ("experts across slow links", MIXTRAL, "dp64:zero1 tp2:sp ep8 etp2 mb1", {}, "dp64:zero1 tp2:sp ep8 mb1", {}),
    ("data-parallel group larger than its buckets feed", LLAMA, "dp640:zero1 mb2 ac:full", {"bucket_bytes": 25e6},
     "dp20:zero1 tp8:sp pp4 mb1", {}),
    ("stages off their rail", LLAMA, "dp10:zero1 tp4:sp pp4 mb1 order:tp-pp-cp-dp", {}, "dp10:zero1 tp4:sp pp4 mb1", {}),
    ("pipeline without enough micro-batches", LLAMA, "dp80:zero1 tp2:sp pp8 mb1", {}, "dp40:zero1 tp4:sp pp4x2:zb-v mb1", {}),
    ("pipeline without data parallel", SMALL, "tp8:sp pp4 mb1", {}, "dp2 tp8:sp pp4 mb1", {}),
    ("model too small to split", GPT2, "dp4 tp2:sp pp2 mb4", {}, "dp16:zero1 mb4", {}),
    ("layers not divisible", LLAMA, "dp16:zero1 tp8:sp pp12 mb1", {}, "dp16:zero1 tp8:sp pp10 mb1", {}),
    ("experts without grouped products", MIXTRAL, "dp64:zero1 tp2:sp ep2 mb1", {"grouped_gemm": False},
     "dp64:zero1 tp2:sp ep2 mb1", {}),
    ("long sequences without flash attention", SMALL, "dp8:zero1 tp8:sp mb1", {"attention": "unfused"},
     "dp8:zero1 tp8:sp mb1", {"attention": "flash2"}),
    ("tensor parallel without sequence parallel", SMALL, "dp8:zero1 tp8 mb1", {}, "dp8:zero1 tp8:sp mb1", {}),
    ("fp16 without loss scaling", SMALL, "dp8:zero1 tp8:sp mb1 fp16", {"loss_scaling": False},
     "dp8:zero1 tp8:sp mb1 fp16", {}),
    ("micro-batch too small for its products", GPT2, "dp16:zero1 mb1", {}, "dp16:zero1 mb16", {}),
    ("vocabulary not divisible", GPT2, "dp4 tp2:sp mb4", {}, "dp16 mb4", {}),
    ("ZeRO-3 under a pipeline", LLAMA, "dp20:zero3 tp8:sp pp4 mb1", {}, "dp20:zero1 tp8:sp pp4 mb1", {}),
    ("recompute that memory does not need", LLAMA, "dp20:zero1 tp8:sp pp4 mb1 ac:full", {}, "dp640:zero3 mb2 ac:full:61", {}),
    ("checkpoint interval far from the best", LLAMA, "dp20:zero1 tp8:sp pp4 mb1", {"checkpoint_interval": 6 * 3600.0},
     "dp20:zero1 tp8:sp pp4 mb1", {"checkpoint_interval": 150.0}),
    ("does not fit", LLAMA, "dp160:zero1 tp4:sp mb8", {}, "dp20:zero1 tp8:sp pp4 mb1", {}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "problem", "bad", "habits", "good", "better"), FIRES, ids=[row[0] for row in FIRES])
def test_a_rule_fires_and_is_silent(
    rule: str, problem: dict[str, Any], bad: str, habits: dict[str, Any], good: str, better: dict[str, Any]
) -> None:
    fired = found(problem, bad, rule, **habits)
    assert fired is not None
    assert fired.repair is not None
    assert fired.source
    assert found(problem, good, rule, **better) is None


def test_every_rule_is_tried() -> None:
    assert {row[0] for row in FIRES} == {rule.name for rule in RULES}


def test_the_price_is_that_of_the_repaired_layout_in_the_same_estimator() -> None:
    fired = found(LLAMA, "dp10:zero1 tp16:sp pp4 mb1", "tensor parallel across nodes")
    assert fired is not None
    assert fired.repair is not None
    assert fired.given is not None
    estimator = Estimator(load_model("llama-3-70b"), load_cluster("h100-superpod"), Workload(4096, 1280))
    repaired = parse_layout(fired.repair.change)
    assert repaired.tp == 8
    assert repaired.world == 640
    assert fired.given == estimator.played(parse_layout("dp10:zero1 tp16:sp pp4 mb1"))
    assert fired.repair.price == estimator.played(repaired)
    assert fired.loss == pytest.approx(1 - fired.repair.price.step_time_s / fired.given.step_time_s)
    assert fired.severity == "warning"


def test_what_costs_nothing_here_is_a_note() -> None:
    seen = found(LLAMA, "dp20:zero1 tp8:sp pp4 mb1", "micro-batch too small for its products")
    assert seen is not None
    assert seen.loss is not None
    assert seen.loss < WORTH
    assert seen.severity == "note"
    assert linted(LLAMA, "dp20:zero1 tp8:sp pp4 mb1").sound


@pytest.mark.parametrize(
    ("problem", "layout", "gpus", "parts"),
    [
        (LLAMA, "dp20:zero1 tp12:sp pp4 mb1", 960, ("64 attention heads",)),
        (SMALL, "dp2 tp5 pp40 mb1", 400, ("32 attention heads", "32 layers")),
        (MIXTRAL, "dp24 ep12 mb1", 24, ("8 experts", "does not divide 128")),
        (LLAMA, "dp20:zero1 tp8:sp pp4 mb1", 512, ("640 ranks, but 512 are given",)),
        (SMALL, "dp6 mb1", 6, ("does not divide 64",)),
        (GPT2, "dp4 tp2:sp pp4x2:dualpipe-v mb16", 32, ("dualpipe-v needs",)),
    ],
)
def test_what_cannot_run_is_found_with_a_repair_that_can(
    problem: dict[str, Any], layout: str, gpus: int, parts: tuple[str, ...]
) -> None:
    result = linted(problem, layout, gpus=gpus)
    assert not result.sound
    assert result.price is None
    said = " ".join(f.what for f in result.findings)
    for part in parts:
        assert part in said
    for finding in result.findings:
        assert finding.severity == "error"
        if gpus not in (6, 24):  # no layout of 6 or 24 ranks near these divides the batch
            assert finding.repair is not None
            repaired = parse_layout(finding.repair.change)
            assert repaired.world == gpus
            assert api.estimate(**problem, layout=repaired, gpus=gpus).fits == finding.repair.price.fits


def test_the_repair_of_heads_keeps_what_divides() -> None:
    [finding] = linted(LLAMA, "dp20:zero1 tp12:sp pp4 mb1", gpus=960).findings
    assert finding.repair is not None
    repaired = parse_layout(finding.repair.change)
    assert 64 % repaired.tp == 0
    assert repaired.tp in (8, 16)


def test_hops_stay_on_the_rail_where_a_stage_is_whole_nodes() -> None:
    assert hops_off_rail(stride=16, pp=4, world=64, domain=8, each=8) == (0, 48)
    assert hops_off_rail(stride=4, pp=4, world=16, domain=8, each=8) == (4, 4)
    assert hops_off_rail(stride=4, pp=2, world=8, domain=8, each=8) == (0, 0)
    off, crossing = hops_off_rail(stride=12, pp=2, world=24, domain=8, each=8)
    assert (off, crossing) == (12, 12)


def test_reshaping_keeps_the_ranks_and_drops_what_has_no_axis_left() -> None:
    given = parse_layout("dp4:zero1x2 tp4:sp pp4x2:zb-v mb2 ac:full:3")
    for found_ in moved(given, "tp", 1):
        assert found_.world == given.world
        assert not found_.sp
    assert {x.dp * x.pp * x.cp for x in moved(given, "tp", 1)} == {64}
    flat = reshaped(given, pp=1, dp=16)
    assert flat is not None
    assert (flat.chunks, flat.schedule, flat.zero_shard) == (1, "1f1b", 2)
    assert reshaped(given, tp=1, dp=1) == replace(given, tp=1, sp=False, dp=1, zero=0, zero_shard=None)
    assert given in set(eased([given]))
    assert {x.micro_batch for x in eased([given])} == {1, 2}


def test_a_repair_is_never_what_was_given_and_fits() -> None:
    case = Case(load_model("llama-3-8b"), load_cluster("h100-superpod"), Workload(4096, 64), parse_layout("dp8 tp8:sp mb1"))
    assert case.quickest([case.layout]) is None
    roomy, cramped = parse_layout("dp8:zero1 tp8:sp mb1"), parse_layout("dp64 mb1")
    first = case.quickest([cramped], [roomy])
    assert first is not None
    assert first.change == str(roomy)


def test_unknown_habits_are_refused() -> None:
    with pytest.raises(UserError, match="flash"):
        linted(SMALL, "dp8 tp8 mb1", attention="fast")
    with pytest.raises(UserError, match="bucket"):
        linted(SMALL, "dp8 tp8 mb1", bucket_bytes=0.0)
