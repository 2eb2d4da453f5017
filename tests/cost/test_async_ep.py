"""What the way to experts costs when it runs under the other pass of a pair."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.estimate import Estimator
from meshwright.cost.program import Place, rank_program
from meshwright.cost.result import Estimate
from meshwright.cost.traffic import step_traffic
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

MODEL = replace(load_model("qwen3-30b-a3b"), layers=16, windows=(), moe_layers=tuple(range(16)))
WORK = Workload(seq=4096, global_batch=512)


def both(layout: str, cluster: str = "h100-superpod") -> tuple[Estimate, Estimate, Layout]:
    """Of a layout with ep{} in it: without and with `:async`."""
    estimator = Estimator(MODEL, load_cluster(cluster), WORK)
    plain, hidden = (parse_layout(layout.format(mode)) for mode in ("", ":async"))
    return estimator.estimate(plain), estimator.estimate(hidden), hidden


def experts(e: Estimate) -> tuple[float, float]:
    (row,) = [row for row in e.collectives if row.axis == "ep"]
    return row.time_s, row.exposed_s


@pytest.mark.parametrize(
    "layout", ["dp32:zero1 pp4x2:dualpipe-v ep32{} mb1", "dp8 tp2:sp pp4x2:dualpipe-v ep16{} mb1 ac:full"]
)
def test_what_pairs_hide_is_what_the_step_and_the_exposed_seconds_lose(layout: str) -> None:
    plain, hidden, _ = both(layout)
    assert experts(plain)[1] == pytest.approx(experts(plain)[0])
    assert experts(hidden)[0] == experts(plain)[0]
    assert 0 < experts(hidden)[1] < 0.9 * experts(plain)[1]
    assert hidden.step_time_s < plain.step_time_s
    assert sum(hidden.breakdown.values()) == pytest.approx(hidden.step_time_s)
    assert hidden.timeline is not None
    saved = max(hidden.timeline.hidden(stage) for stage in range(hidden.layout.pp))
    assert plain.step_time_s - hidden.step_time_s <= saved * (1 + 1e-9)
    assert 0 < hidden.bubble < 1


def test_both_passes_of_a_pair_have_temporaries() -> None:
    plain, hidden, _ = both("dp32:zero1 pp4x2:dualpipe-v ep32{} mb1")
    for one, other in zip(plain.memory, hidden.memory, strict=True):
        assert one.categories["working"] < other.categories["working"] <= 2 * one.categories["working"]
        assert {k: v for k, v in one.categories.items() if k != "working"} == {
            k: v for k, v in other.categories.items() if k != "working"
        }


def test_nothing_is_hidden_where_ranks_share_the_cores_that_move_the_bytes() -> None:
    plain, hidden, layout = both("dp2 pp2x2:dualpipe-v ep2{} mb4", "local")
    assert experts(hidden) == experts(plain)
    assert hidden.step_time_s >= plain.step_time_s
    assert hidden.timeline is not None
    assert all(hidden.timeline.hidden(stage) == 0 for stage in range(layout.pp))


def test_the_same_bytes_are_sent() -> None:
    plain, hidden = (parse_layout(f"dp32:zero1 pp4x2:dualpipe-v ep32{mode} mb1") for mode in ("", ":async"))
    sent = [
        step_traffic(rank_program(MODEL, layout, WORK, Place(0)), micro_batches(layout, WORK)) for layout in (plain, hidden)
    ]
    assert sent[0] == sent[1]
