"""What offload frees and what it costs."""

from __future__ import annotations

import pytest
from cost_cases import H100, WORK

from meshwright.cost.estimate import Estimator, estimate
from meshwright.cost.memory import away_bytes, state_bytes
from meshwright.cost.offload import OffloadCost
from meshwright.cost.program import Place, rank_program
from meshwright.spec.cluster import Cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload


@pytest.mark.parametrize(
    ("layout", "kept"), [("dp4:zero3 mb1 offload:all", 14), ("dp4:zero3 mb1 offload:all params:fp32", 12)]
)
def test_what_is_offloaded_leaves_the_device(layout: str, kept: int) -> None:
    """bf16 parameters, master weights and moments are 2 + 12 bytes a parameter, fp32 parameters and moments 4 + 8."""
    model, parsed = load_model("llama-3-8b"), parse_layout(layout)
    program = rank_program(model, parsed, WORK, Place())
    owned = sum(bucket.owned for bucket in program.buckets)
    away, held = away_bytes(program, parsed), state_bytes(program, parsed)
    assert away == {"host": pytest.approx(kept * owned, rel=1e-3)}  # but for the vectors, which stay
    assert held["parameters"] < 1e-3 * 2 * owned
    assert held["optimizer"] == 4 * len(program.buckets)
    assert held["offload"] < 0.4 * away["host"], "a few buckets of many"


def offload_cost(text: str, cluster: Cluster) -> OffloadCost:
    found = estimate(load_model("llama-3-8b"), cluster, Workload(4096, 64), parse_layout(text)).offload
    assert found is not None
    return found


def test_offload_takes_its_bytes_over_the_link() -> None:
    """24 bytes a parameter for the optimizer, half of them each way at once; all but the first and the last bucket may hide under the
    update, which is far quicker here."""
    cost = offload_cost("dp8:zero1 mb1 offload:optimizer", H100)
    assert cost.read_bytes == cost.written_bytes == cost.kept_bytes
    assert cost.time_s == pytest.approx(cost.kept_bytes / 63e9)
    assert 0.8 * cost.time_s < cost.exposed_s < 1.5 * cost.time_s
    all_ = offload_cost("dp8:zero3 mb1 offload:all", H100)
    owned = all_.kept_bytes / 14
    # Eight micro-batches read the layers for forward and backward, embedding and head once.
    assert all_.read_bytes - 12 * owned == pytest.approx(8 * 2 * owned * 2, rel=0.15)
    assert all_.exposed_s < 0.5 * all_.time_s, "the passes hide their reads"


def test_a_rate_that_is_not_known_is_told() -> None:
    text = "dp8:zero1 mb1 offload:optimizer@file"
    priced = estimate(load_model("llama-3-8b"), H100, Workload(4096, 64), parse_layout(text))
    assert "a lower bound" in priced.evidence["offload"]
    assert "no file_bandwidth of a node of h100-superpod" in priced.evidence["offload"]
    rated = H100.model_copy(update={"node": H100.node.model_copy(update={"file_bandwidth": 16e9})})
    cost = offload_cost(text, rated)
    assert cost.where == "file"
    assert cost.time_s == pytest.approx(2 * cost.kept_bytes / (16e9 / 8)), "eight ranks share the drives"
    assert priced.as_dict()["memory"][0]["away"] == {"file": cost.kept_bytes}
    assert priced.as_dict()["offload"]["kept_bytes"] == cost.kept_bytes


@pytest.mark.parametrize(
    "layout", ["dp8:zero1 mb1 offload:optimizer", "dp8:zero3 mb1 offload:all", "dp8:zero3 mb1 params:fp32"]
)
def test_offload_and_casts_cost_time(layout: str) -> None:
    """And the closed form agrees with the schedule that is played."""
    model, work = load_model("llama-3-8b"), Workload(4096, 64)
    plain = estimate(model, H100, work, parse_layout(" ".join(layout.split()[:2])))
    estimator = Estimator(model, H100, work)
    priced, quick = estimator.estimate(parse_layout(layout)), estimator.played(parse_layout(layout))
    assert priced.step_time_s > plain.step_time_s
    assert quick.step_time_s == pytest.approx(priced.step_time_s)
    assert quick.peak_bytes == priced.peak_bytes
