"""Stages of equal cost: the cut is the best there is, and what it changes is worth it."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import api
from meshwright.planner.stages import least_maximum
from meshwright.spec.errors import UserError
from meshwright.spec.notation import parse_layout

PROBLEM = {"model": "llama-3-8b", "cluster": "h100-superpod", "seq": 4096, "global_batch": 256}


def sums(costs: list[float], counts: tuple[int, ...], first: float, last: float) -> list[float]:
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    out = [sum(costs[a:b]) for a, b in pairwise(ends)]
    out[0] += first
    out[-1] += last
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_cut_has_a_smaller_maximum(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9))
    parts = data.draw(st.integers(1, len(costs)))
    first, last = (float(data.draw(st.integers(0, 12))) for _ in range(2))
    counts = least_maximum(costs, parts, first, last)
    assert sum(counts) == len(costs)
    assert min(counts) >= 1

    def worth(counts: tuple[int, ...]) -> tuple[float, float]:
        each = sums(costs, counts, first, last)
        return max(each), sum(x * x for x in each)

    every = [
        tuple(b - a for a, b in pairwise((0, *inner, len(costs))))
        for inner in combinations(range(1, len(costs)), parts - 1)
    ]
    assert worth(counts) == min(map(worth, every))


def test_more_parts_than_layers() -> None:
    with pytest.raises(UserError, match="3 parts of 2 layers"):
        least_maximum([1.0, 1.0], 3)


@pytest.mark.parametrize("layout", ["dp8 pp4 mb1", "dp8 pp4x2:interleaved mb1", "dp8 pp4x2:zb-v mb1"])
def test_a_large_vocabulary_takes_layers_from_the_last_stage(layout: str) -> None:
    balanced = api.balance(layout=layout, **PROBLEM)
    counts = balanced.best.layout.stage_layers
    assert counts is not None
    assert counts[-1] == min(counts) < max(counts)
    assert balanced.best.step_time_s < balanced.even.step_time_s
    assert balanced.best.bubble < balanced.even.bubble
    again = api.estimate(layout=str(balanced.best.layout), **PROBLEM)
    assert again.step_time_s == balanced.best.step_time_s
    assert len(balanced.chunk_seconds) == len(counts)


def test_even_stages_stay_where_they_are_as_good() -> None:
    balanced = api.balance(layout="dp40:zero1 tp8:sp pp2 mb1", **PROBLEM | {"model": "llama-3-70b", "global_batch": 1280})
    assert balanced.best is balanced.even
    assert balanced.best.layout.stage_layers is None


def test_what_cannot_be_balanced() -> None:
    with pytest.raises(UserError, match="pp of 2 or more, got pp1"):
        api.balance(layout="dp8 mb1", **PROBLEM)
    with pytest.raises(
        UserError, match=r"stages:16-15 holds 31 layers, but llama-3-8b has 32: `meshwright layout balance`"
    ):
        api.estimate(layout="dp8 pp2 mb1 stages:16-15", **PROBLEM)


def test_the_json_names_the_layout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from meshwright.cli.main import main

    problem = [f"--{name.replace('_', '-')}={value}" for name, value in PROBLEM.items()]
    monkeypatch.setattr("sys.argv", ["meshwright", "layout", "balance", "dp8 pp4 mb1", *problem, "--json"])
    with pytest.raises(SystemExit):
        main()
    shown = json.loads(capsys.readouterr().out)
    assert parse_layout(shown["layout"]).stage_layers is not None
    assert shown["speedup"] > 1.05
