"""A plan is no slower than what a person would take, says why each other layout loses, and what to do when none fits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from planner_cases import PROBLEMS, some_layouts

from meshwright import api
from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate
from meshwright.planner.arrays import Ints
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.explain import reason_against
from meshwright.planner.search import Plan, plan
from meshwright.planner.space import legal_space
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.workload import Workload


@cache
def llama_70b() -> Plan:
    return api.plan(model="llama-3-70b", cluster="h100-superpod", gpus=640, seq=4096, global_batch=1280)


def test_70b_on_640_h100_is_no_slower_than_what_a_person_would_take() -> None:
    found = llama_70b()
    usual = api.estimate(
        model="llama-3-70b",
        cluster="h100-superpod",
        gpus=640,
        seq=4096,
        global_batch=1280,
        layout="dp20:zero1 tp8:sp pp4 mb1",
    )
    assert found.best is not None
    assert found.best.estimate.fits
    assert usual.fits
    assert found.best.estimate.layout.world == 640
    assert found.best.estimate.step_time_s <= usual.step_time_s
    assert found.searched > found.fitting > 100


def test_candidates_are_the_best_and_its_runners_up_in_order() -> None:
    found = llama_70b()
    assert found.candidates[0] == found.best
    assert len(found.candidates) == 5
    times = [c.estimate.step_time_s for c in found.candidates]
    assert times == sorted(times)
    assert all(c.estimate.fits for c in found.candidates)
    assert len({c.estimate.layout for c in found.candidates}) == 5
    more = api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=512, global_batch=16, top=20)
    assert len(more.candidates) == 20
    only = api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=512, global_batch=16, top=1)
    assert only.candidates == (only.best,)


def test_the_answer_turns_into_json_and_progress_is_told() -> None:
    told: list[int] = []
    found = api.plan(model="gpt2", cluster="local", gpus=4, seq=128, global_batch=8, progress=told.append)
    assert told == sorted(told)
    assert told[-1] <= found.priced <= found.searched
    d = json.loads(json.dumps(found.as_dict()))
    assert set(d) >= {"best", "candidates", "alternatives", "searched", "priced", "fitting", "played", "gap", "seconds"}
    assert d["best"]["layout"] == d["candidates"][0]["layout"]
    assert all(row["reason"] for row in (*d["candidates"], *d["alternatives"]))
    assert all(row["name"] for row in d["alternatives"])


def sensible(reason: str) -> None:
    """One line that names a figure, and no difference of nothing."""
    assert reason
    assert "\n" not in reason
    assert not re.search(r"(?<![\d.])-?0(\.0+)? m?s longer|-\d[\d.]* m?s longer", reason), reason
    bubble = re.search(r"bubble [^:]*: ([\d.]+)% of the step, ([\d.]+)% in the best", reason)
    assert not bubble or float(bubble[1]) * 1.0005 >= float(bubble[2]), reason


def test_every_alternative_has_its_reason() -> None:
    found = llama_70b()
    assert found.best is not None
    names = [name for name, _ in found.alternatives]
    best = found.best.estimate.layout
    taken = {"no pipeline": best.pp == 1, "no recompute": best.recompute == "none", "no ZeRO": best.zero == 0}
    taken = {name for name, is_so in taken.items() if is_so}
    assert len(set(names)) == len(names) >= 4
    for name, candidate in found.alternatives:
        assert candidate.estimate.layout != found.best.estimate.layout
        assert not candidate.estimate.fits or candidate.estimate.step_time_s >= found.best.estimate.step_time_s
        sensible(candidate.reason)
        x = candidate.estimate.layout
        meaning = {
            "no pipeline": x.pp == 1,
            "no tensor parallel": x.tp == 1,
            "full recompute": x.recompute == "full",
            "no ZeRO": x.zero == 0,
        }
        assert meaning.get(name, True)
        assert name not in taken, "the best is of that kind itself"
    for candidate in found.candidates[1:]:
        sensible(candidate.reason)


@pytest.mark.parametrize(
    ("model", "cluster", "gpus", "seq", "batch"), [p[:5] for p in PROBLEMS[:3]] + [("gpt2-xl", "h100-superpod", 8, 512, 24)]
)
def test_every_layout_that_loses_has_a_sensible_reason(model: str, cluster: str, gpus: int, seq: int, batch: int) -> None:
    loaded, machine, work = load_model(model), load_cluster(cluster), Workload(seq, batch)
    estimator = Estimator(loaded, machine, work)
    every = [estimator.estimate(x) for x in some_layouts(model, cluster, gpus, seq, batch, 300)]
    best = min((e for e in every if e.fits), key=lambda e: e.step_time_s)
    for e in every:
        reason = reason_against(e, best)
        sensible(reason)
        assert reason.startswith("does not fit") == (not e.fits)
        assert reason.startswith("as quick as the best") == (e.fits and e.step_time_s <= best.step_time_s * 1.0005)


def test_a_layout_that_does_not_fit_is_told_what_takes_the_room() -> None:
    e = api.estimate(model="llama-3-8b", cluster="h100-superpod", seq=4096, global_batch=8, layout="dp8 mb1")
    reason = reason_against(e, None)
    assert re.fullmatch(r"does not fit: stage 0 needs (\d+\.\d) GiB of 80\.0, (\d+\.\d) of it optimizer", reason)
    assert f"{e.peak_bytes / 2**30:.1f} GiB" in reason


def test_nothing_fits_names_the_nearest_and_what_it_lacks() -> None:
    found = api.plan(model="llama-3-405b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=8)
    assert found.best is None
    assert found.fitting == 0 < found.searched
    assert found.alternatives == ()
    [nearest] = found.candidates
    assert not nearest.estimate.fits
    estimator = Estimator(load_model("llama-3-405b"), load_cluster("h100-superpod"), Workload(4096, 8))
    others = some_layouts("llama-3-405b", "h100-superpod", 8, 4096, 8, 200)
    held = [x for x in others if estimator.host_holds(x)]
    assert len(held) > 50
    assert nearest.estimate.peak_bytes <= min(estimator.played(x).peak_bytes for x in held)
    assert re.search(
        r"needs \d+\.\d GiB of 80\.0, \d+\.\d of it (optimizer|parameters|gradients|activations)", nearest.reason
    )
    assert found.as_dict()["best"] is None


def test_no_more_is_offloaded_than_the_host_holds() -> None:
    model, cluster, work = load_model("llama-3-70b"), load_cluster("h100-superpod"), Workload(8192, 16)
    found = plan(model, cluster, work, 8)
    assert found.best is not None
    best = found.best.estimate
    assert best.offload is not None
    assert best.layout.offload == "optimizer"  # 12 bytes of each of 70.6e9 parameters, over 8 ranks
    assert best.offload.kept_bytes == pytest.approx(12 * 70.6e9 / 8, rel=0.01)
    assert best.host_limit_bytes == 2e12 / 8
    node = cluster.node.model_copy(update={"host_memory_bytes": 800e9})
    small = cluster.model_copy(update={"node": node})
    estimator = Estimator(model, small, work)
    refused = estimator.estimate(best.layout)
    assert refused.peak_bytes <= refused.memory_limit_bytes
    assert not refused.fits
    assert not estimator.fits(best.layout)
    assert not estimator.played(best.layout).fits
    assert (
        reason_against(refused, None)
        == "does not fit: a rank offloads 98.6 GiB, and the host has 93.1 for each of its ranks"
    )
    nothing = plan(model, small, work, 8)
    assert nothing.best is None
    assert Estimator(model, small, work).host_holds(nothing.candidates[0].estimate.layout)
    unknown = cluster.model_copy(update={"node": cluster.node.model_copy(update={"host_memory_bytes": None})})
    assert Estimator(model, unknown, work).fits(best.layout)


def test_layouts_that_fit_by_the_closed_form_alone_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was thought to fit and does not, once its buckets are planned, is passed over; if nothing is left, that is said."""
    bound = ClosedForm.price

    def optimistic(self: ClosedForm, at: Ints, **given: Any) -> Iterator[Bounds]:
        return (replace(b, bytes=np.zeros_like(b.bytes)) for b in bound(self, at, **given))

    monkeypatch.setattr(ClosedForm, "price", optimistic)
    found = api.plan(model="llama-3-405b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=8)
    assert found.best is None
    assert "does not fit" in found.candidates[0].reason
    found = api.plan(model="llama-3-8b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=64)
    assert found.best is not None
    assert found.best.estimate.fits
    assert len(found.candidates) == 5


@pytest.mark.parametrize(
    ("gpus", "batch", "model"), [(37, 8, "llama-3-8b"), (1009, 8, "llama-3-8b"), (26, 4, "gpt2"), (83, 5, "llama-3-70b")]
)
def test_no_legal_layout_names_the_nearest_counts(gpus: int, batch: int, model: str) -> None:
    with pytest.raises(UserError) as refused:
        api.plan(model=model, cluster="h100-superpod", gpus=gpus, seq=1024, global_batch=batch)
    message = str(refused.value)
    assert "\n" not in message
    assert f"no layout of {gpus} ranks" in message
    assert f"global batch of {batch}" in message
    offered = [int(n) for n in re.search(r"try (.*) ranks", message)[1].split(" or ")]  # type: ignore[index]
    work = Workload(1024, batch)
    legal = [n for n in range(gpus, 0, -1) if len(legal_space(load_model(model), work, n, "bf16").local)]
    assert offered == legal[: len(offered)] != []


def test_when_no_count_would_help_the_reason_is_the_models_own() -> None:
    with pytest.raises(UserError) as refused:
        api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=2048, global_batch=8)
    assert "1024 learned positions" in str(refused.value)
    assert "try  ranks" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"seq": 0}, "seq must be at least 1, got 0"),
        ({"global_batch": -2}, "global_batch must be at least 1, got -2"),
        ({"model": "gtp2"}, "unknown model 'gtp2': did you mean gpt2"),
        ({"cluster": "h100"}, "unknown cluster 'h100'"),
        ({"cluster": "local", "gpus": 8}, "local is one node of 4 ranks"),
        ({"precision": "fp64", "model": "gpt2"}, "h100-sxm has no fp64 rate"),
        ({"precision": "fp4"}, "h100-sxm has no fp4 rate; it has fp32, tf32, bf16, fp16, fp8, int8"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, object], said: str) -> None:
    asked = {"model": "llama-tiny", "cluster": "h100-superpod", "gpus": 4, "seq": 128, "global_batch": 8} | changes
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        api.plan(**asked)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_estimates_of_a_plan_are_those_of_estimate() -> None:
    found = llama_70b()
    assert found.best is not None
    best: Estimate = found.best.estimate
    again = api.estimate(model="llama-3-70b", cluster="h100-superpod", seq=4096, global_batch=1280, layout=str(best.layout))
    assert again.as_dict() == best.as_dict()
