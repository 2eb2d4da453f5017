"""A dry run in seconds: as long as the estimate has it, and readable by Perfetto."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from meshwright.api import trace
from meshwright.cost.estimate import Estimator
from meshwright.export.chrome import PREDICTED, write_chrome
from meshwright.schedule.actions import Kind
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.trace.result import Sent
from meshwright.trace.seconds import Prices
from meshwright.trace.timeline import COMPUTE, StageTimeline, in_order, in_seconds

CLUSTER = load_cluster("h100-superpod")


SHORT = replace(load_model("gpt2"), layers=4)
LAYOUT = "dp2:zero1 tp2:sp pp2 mb4"


@cache
def predicted(model: str, layout: str, seq: int, batch: int) -> tuple[Prices, tuple[StageTimeline, ...]]:
    known = SHORT if model == "short gpt2" else load_model(model)
    traced = trace(model=known, layout=layout, seq=seq, global_batch=batch)
    prices = Prices(traced, known, CLUSTER)
    return prices, in_seconds(traced, known, prices)


@pytest.mark.parametrize(
    ("model", "layout", "seq", "batch"),
    [
        ("short gpt2", LAYOUT, 1024, 32),
        pytest.param("llama-3-8b", "dp8 pp4 mb1", 4096, 128, marks=pytest.mark.parity),
        pytest.param("llama-3-8b", "dp8:zero3 tp2:sp mb1 ac:full", 4096, 64, marks=pytest.mark.parity),
        pytest.param("mixtral-8x7b", "dp8:zero1 ep8 pp4x2:interleaved mb1", 4096, 64, marks=pytest.mark.parity),
        pytest.param("llama-3-8b", "cp4:ring tp2:sp pp2:zb-h1 mb1", 32768, 8, marks=pytest.mark.parity),
    ],
)
def test_the_step_takes_what_the_estimate_says(model: str, layout: str, seq: int, batch: int) -> None:
    """Event by event, and piece by piece: two sums over the same work, of which one knows the order."""
    prices, timelines = predicted(model, layout, seq, batch)
    assert max(each.end for each in timelines) == pytest.approx(prices.estimate.step_time_s, rel=0.15)


def test_nothing_runs_before_what_it_waits_for() -> None:
    prices, timelines = predicted("short gpt2", LAYOUT, 1024, 32)
    first, last = timelines
    ends = {bar.section.name: bar.end for bar in first.bars if bar.section.action}
    for bar in last.bars:
        action = bar.section.action
        if action is not None and action.kind is Kind.FORWARD:
            assert bar.start >= ends[str(action)] + prices.send * 0.999
    for each in timelines:
        for lane in {span.lane for span in each.spans}:
            spans = sorted((s for s in each.spans if s.lane == lane), key=lambda s: s.start)
            assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))
    beside = [s for s in first.spans if isinstance(s.what, Sent) and s.what.number and s.lane == "tp"]
    work = [s for s in first.spans if s.lane == COMPUTE]
    assert any(a.start < b.end and b.start < a.end for a in beside for b in work), "nothing hides"


def test_head_room_is_what_is_left_of_the_memory() -> None:
    prices, _ = predicted("short gpt2", LAYOUT, 1024, 32)
    traced = prices.trace
    overhead = Estimator(SHORT, CLUSTER, traced.workload).overhead
    assert prices.head_room(traced.fullest) == CLUSTER.accelerator.memory_bytes - int(overhead) - traced.fullest.peak_bytes


def test_perfetto_finds_what_it_needs(tmp_path: Path) -> None:
    prices, seconds = predicted("short gpt2", LAYOUT, 1024, 32)
    traced = prices.trace
    for name, timelines in (("order", in_order(traced)), ("seconds", seconds)):
        out = tmp_path / f"{name}.json"
        write_chrome(traced, timelines, out, PREDICTED)
        found: dict[str, Any] = json.loads(out.read_text())
        assert found["otherData"]["time"] == PREDICTED
        for event in found["traceEvents"]:
            assert {"name", "ph", "pid", "tid", "ts"} <= set(event)
            assert event["ph"] in "XCM"
            assert event["ts"] >= 0
            assert event["ph"] != "X" or event["dur"] >= 0
        lanes = {(e["pid"], e["tid"]) for e in found["traceEvents"] if e["ph"] == "X"}
        assert lanes <= {(e["pid"], e["tid"]) for e in found["traceEvents"] if e["name"] == "thread_name"}
        assert {e["pid"] for e in found["traceEvents"]} == {0, 1}
