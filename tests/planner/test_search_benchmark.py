"""What `benchmarks/search.py` says of the search and of other planners is what they answer."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

import search
from meshwright.cost.estimate import Estimator
from meshwright.planner.search import plain_layouts
from meshwright.planner.space import NONE, Relief, legal_space
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.workload import Workload

SMALL = search.Problem("gpt3-6.7b", "a100-superpod", 8, 2048, 8)


def test_the_narrow_search_finds_the_best_of_what_it_says_it_covers() -> None:
    model, cluster, work = load_model(SMALL.model), load_cluster(SMALL.cluster), Workload(SMALL.seq, SMALL.global_batch)
    space = legal_space(model, work, SMALL.gpus, "bf16", cluster.fabric.domain)
    covered = [
        space.layout(at, pipeline, sharding, relief)
        for at, pipeline, sharding in plain_layouts(space)
        if space.columns.cp[at] == 1
        and sharding.zero <= 1
        and sharding.shard is None
        and pipeline.schedule in ("1f1b", "interleaved")
        and model.layers % (pipeline.pp * pipeline.chunks) == 0
        for relief in (NONE, Relief("full"), Relief("selective"))
    ]
    found = search.narrowed(SMALL)
    assert found["candidates"] == len(covered)
    estimator = Estimator(model, cluster, work)
    prices = [estimator.played(layout) for layout in covered]
    assert found["step_time_s"] == pytest.approx(min(p.step_time_s for p in prices if p.fits), rel=1e-12)


def test_a_peers_layout_is_priced_here_too_and_its_failure_is_a_row() -> None:
    answer = {
        "cpu_seconds": 2.0,
        "candidates": 10,
        "share": 0.5,
        "step_time_s": 1.5,
        "layout": {
            "dp": 2,
            "tp": 2,
            "sp": True,
            "pp": 2,
            "chunks": 2,
            "zero": 1,
            "micro_batch": 1,
            "recompute": "selective",
        },
    }
    told = "import json, sys; assert json.load(sys.stdin)['machine']['network_bandwidth'] == 25e9; print(sys.argv[1])"
    row = search.theirs([sys.executable, "-c", told, json.dumps(answer)], SMALL)
    assert row["layout"] == "dp2:zero1 tp2:sp pp2x2:interleaved mb1 ac:selective bf16"
    assert row["our_step_time_s"] > 0
    failed = search.theirs([sys.executable, "-c", "raise SystemExit('no such planner')"], SMALL)
    assert failed == {"failed": ["no such planner"]}
    shown = io.StringIO()
    search.show({"Calculon": [row], "llm-analysis": []}, Console(file=shown, width=200))
    assert "50% of its search" in shown.getvalue()
    assert "absent" in shown.getvalue()
