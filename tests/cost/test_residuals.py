"""Error bars of estimates."""

from __future__ import annotations

import pytest

from meshwright import api
from meshwright.spec.residuals import load_residuals, step_class

ASKED = {"seq": 1024, "global_batch": 16}


@pytest.mark.parametrize(
    ("layout", "cluster", "name"),
    [("dp8:zero1 mb1", "h100-superpod", "one node"), ("dp16:zero1 mb1", "h100-superpod", "several nodes")],
)
def test_an_estimate_has_the_bar_of_its_class(layout: str, cluster: str, name: str) -> None:
    e = api.estimate(model="gpt2", cluster=cluster, layout=layout, **ASKED)  # type: ignore[arg-type]
    bar = load_residuals().step_time[name]
    shown = e.as_dict()["error_bars"]["step_time_s"]
    assert (shown["low"], shown["high"]) == (e.step_time_s * bar.low, e.step_time_s * bar.high)
    assert shown["low"] < e.step_time_s < shown["high"]
    assert shown["runs"] >= shown["sources"] >= 3


def test_ranks_that_share_cores_have_no_bar() -> None:
    e = api.estimate(model="gpt2", cluster="local", layout="dp4 mb1", **ASKED)  # type: ignore[arg-type]
    assert e.error_bar is None
    assert e.as_dict()["error_bars"] == {}


def test_a_class_of_few_sources_has_a_bar_no_narrower_than_any_other() -> None:
    e = api.estimate(model="mixtral-8x7b", cluster="h100-superpod", layout="dp16:zero3 ep8 mb1", **ASKED)  # type: ignore[arg-type]
    bars = load_residuals().step_time
    assert e.error_bar == bars["experts"]
    assert bars["experts"].widened
    assert bars["experts"].low == min(bar.low for bar in bars.values())
    assert bars["experts"].high == max(bar.high for bar in bars.values())
    assert not any(bar.widened for bar in bars.values() if bar.sources >= 3)


def test_experts_are_a_class_of_their_own_on_any_number_of_nodes() -> None:
    assert step_class(1, True) == step_class(9, True) not in (step_class(1, False), step_class(9, False))
