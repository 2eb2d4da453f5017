"""What stands around the best layout: refinement, the front of memory and speed, sensitivity, ways out, sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from meshwright import api
from meshwright.cost.estimate import Estimator
from meshwright.planner.around import Problem, pareto, sensitivity
from meshwright.planner.objectives import Sizer, counts
from meshwright.planner.refine import climb, neighbours, refine, refined
from meshwright.planner.rules.reshape import order_has_price
from meshwright.planner.search import plan
from meshwright.planner.ways import SHOWN, Shortfall, ways_out
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import PAIRING, Layout
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

H100 = load_cluster("h100-superpod")
GPT2 = Problem(load_model("gpt2-xl"), H100, Workload(1024, 32), 8)
LLAMA = Problem(load_model("llama-3-8b"), H100, Workload(4096, 64), 16)


def estimator(problem: Problem) -> Estimator:
    return Estimator(problem.model, problem.cluster, problem.workload)


# --- refinement


def test_recompute_is_cut_down_to_what_memory_needs() -> None:
    problem = Problem(load_model("llama-3-8b"), H100, Workload(8192, 64), 8)
    given = parse_layout("dp8:zero3 mb2 ac:full")
    price = estimator(problem).played(given)
    best, better = climb(estimator(problem), given, price)
    assert best.recompute == "full"
    assert best.recompute_layers is not None
    assert better.fits
    assert better.step_time_s < price.step_time_s
    fewer = parse_layout(f"dp8:zero3 mb2 ac:full:{best.recompute_layers - 1}")
    assert not estimator(problem).played(fewer).fits


def test_cheap_parts_run_again_before_whole_layers() -> None:
    problem = Problem(load_model("llama-3-8b"), H100, Workload(8192, 64), 8)
    given = parse_layout("dp4:zero1 tp2:sp mb1 ac:full")
    most = estimator(problem).played(parse_layout("dp4:zero1 tp2:sp mb1")).peak_bytes - 1
    accelerator = H100.accelerator.model_copy(update={"memory_bytes": most})
    tight = Problem(problem.model, H100.model_copy(update={"accelerator": accelerator}), problem.workload, 8)
    best, price = climb(estimator(tight), given, estimator(tight).played(given))
    assert best.recompute == "selective"
    assert set(best.recompute_parts) <= {"norms", "activation"}
    assert best.async_tp
    assert most - 2**30 < price.peak_bytes <= most


def test_no_change_that_does_not_fit_is_taken() -> None:
    given = parse_layout("dp8:zero1 pp2:1f1b mb1")
    [(free, price)] = refine(estimator(LLAMA), [given])
    least = estimator(LLAMA).played(given).peak_bytes
    assert free != given
    assert price.peak_bytes > least
    accelerator = H100.accelerator.model_copy(update={"memory_bytes": least})
    tight = Problem(LLAMA.model, H100.model_copy(update={"accelerator": accelerator}), LLAMA.workload, 16)
    [(held, its)] = refine(estimator(tight), [given])
    assert held == given
    assert its.fits


def test_stages_of_equal_cost_are_found() -> None:
    given = parse_layout("dp8:zero1 pp2:1f1b mb1")
    [(best, price)] = refine(estimator(LLAMA), [given])
    assert best.stage_layers is not None
    assert sum(best.stage_layers) == 32
    assert price == estimator(LLAMA).played(best)
    assert price.step_time_s < estimator(LLAMA).played(given).step_time_s


def test_the_way_to_experts_is_put_under_the_other_pass_of_a_pair() -> None:
    problem = Problem(load_model("qwen3-30b-a3b"), H100, Workload(4096, 512), 128)
    given = parse_layout("dp32:zero1 pp4:1f1b ep32 mb1")
    [(best, price)] = refine(estimator(problem), [given])
    assert best.async_ep
    assert best.schedule in PAIRING
    assert price.step_time_s < 0.9 * estimator(problem).played(given).step_time_s
    dense = neighbours(estimator(LLAMA), parse_layout("dp4 tp2 pp2 mb1"))
    assert not any(layout.async_ep for layout in [*dense, *neighbours(estimator(problem), parse_layout("dp128 ep32"))])


def test_refinement_only_gains_and_stays_on_the_same_ranks() -> None:
    found = plan(LLAMA.model, LLAMA.cluster, LLAMA.workload, LLAMA.gpus, top=3)
    again = refined(found, estimator(LLAMA))
    assert found.best is not None
    assert again.best is not None
    assert again.best.estimate.step_time_s <= found.best.estimate.step_time_s
    assert all(c.estimate.layout.world == 16 and c.estimate.fits for c in again.candidates)
    assert len({c.estimate.layout for c in again.candidates}) == len(again.candidates)
    steps = [c.estimate.step_time_s for c in again.candidates]
    assert steps == sorted(steps)


def test_orders_that_have_no_price_of_their_own_are_not_tried() -> None:
    given = parse_layout("dp4:zero1 tp2:sp pp2 cp2:ring mb1")
    tried = [
        x for x in neighbours(estimator(Problem(LLAMA.model, H100, LLAMA.workload, 32)), given) if x.order != given.order
    ]
    assert tried
    assert all(abs(x.order.index("dp") - x.order.index("cp")) == 1 for x in tried)
    assert order_has_price(parse_layout("dp4 tp2 cp2"), 8)
    assert not order_has_price(parse_layout("dp4 tp2 cp2 order:cp-tp-dp-pp"), 8)
    assert not order_has_price(parse_layout("dp4 tp4 pp4 order:tp-pp-dp-cp"), 8)
    assert not order_has_price(parse_layout("dp8 pp2 ep4 order:pp-dp-tp-cp"), 8)


# --- memory and speed


def test_the_front_trades_speed_for_memory() -> None:
    four = Problem(LLAMA.model, H100, Workload(2048, 8), 4)
    front, best = pareto(four), four.best()
    assert best is not None
    assert front[0].layout == best.layout
    assert len(front) >= 3
    for fast, roomy in pairwise(front):
        assert roomy.peak_bytes < fast.peak_bytes
        assert roomy.step_time_s >= fast.step_time_s
    assert all(e.memory_limit_bytes == H100.accelerator.memory_bytes for e in front)


# --- sensitivity


def test_sensitivity_asks_the_search_again() -> None:
    base, nics, batch, half = sensitivity(Problem(LLAMA.model, H100, Workload(2048, 64), 16))
    assert base.estimate is not None
    assert nics.estimate is not None
    assert batch.estimate is not None
    assert half.estimate is not None
    assert nics.change == "9 NICs a node instead of 8"
    assert nics.estimate.step_time_s <= base.estimate.step_time_s * (1 + 5e-3)
    assert batch.estimate.workload.global_batch == 128
    assert batch.estimate.tokens_per_s >= base.estimate.tokens_per_s * (1 - 5e-3)
    assert half.gpus == half.estimate.layout.world == 8


def test_another_nic_is_another_network() -> None:
    problem = Problem(load_model("llama-3.2-1b"), H100, Workload(1024, 16), 16)
    base, nics, *_ = sensitivity(problem)
    assert base.estimate is not None
    assert nics.estimate is not None
    assert nics.estimate.step_time_s < base.estimate.step_time_s * (1 - 5e-3)


def test_a_cluster_without_a_network_has_no_nic_to_add() -> None:
    local = Problem(load_model("llama-small"), load_cluster("local"), Workload(256, 4), 2)
    assert [v.change for v in sensitivity(local)] == ["as asked", "global batch 8", "1 accelerators"]


# --- ways out


def test_when_nothing_fits_the_ways_out_do_and_the_cheapest_is_first() -> None:
    problem = Problem(load_model("llama-3-70b"), H100, Workload(8192, 16), 4)  # not even with its optimizer offloaded
    found = plan(problem.model, problem.cluster, problem.workload, problem.gpus)
    assert found.best is None
    nearest = found.candidates[0].estimate
    short = Shortfall.of(nearest)
    assert short.bytes == nearest.peak_bytes - nearest.memory_limit_bytes > 0
    assert short.category == "gradients"
    assert nearest.offload is not None
    ways = ways_out(estimator(problem), nearest.layout)
    assert len(ways) == SHOWN
    assert any(way.layout.world > 4 for way in ways)
    for way in ways:
        priced = estimator(problem).estimate(way.layout)
        assert priced.fits
        assert priced.step_time_s == pytest.approx(way.price.step_time_s)
    costs = [way.accelerator_seconds for way in ways]
    assert costs == sorted(costs)


def test_a_layout_that_lacks_little_has_the_mildest_way_first() -> None:
    given = parse_layout("dp16 mb1")
    assert not estimator(LLAMA).played(given).fits
    ways = {way.change: way for way in ways_out(estimator(LLAMA), given)}
    assert "ZeRO" in ways
    assert ways["ZeRO"].layout.zero in (1, 2)


# --- how many


def test_counts_are_parts_of_a_node_and_whole_nodes() -> None:
    assert counts(H100, 64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 64]
    assert counts(H100, 56)[-1] == 56
    assert counts(H100, 4) == [1, 2, 4]


def test_the_fewest_for_a_deadline_meet_it_and_no_fewer_do() -> None:
    sizer = Sizer(GPT2, tokens=1e10)
    one = sizer._at(1)
    assert one is not None
    found = sizer.for_deadline(one.bill.wall_seconds / 3)
    assert found.chosen is not None
    assert found.chosen.bill.wall_seconds <= one.bill.wall_seconds / 3
    assert found.chosen.gpus in (4, 8)
    for sized in found.tried:
        assert sized.gpus >= found.chosen.gpus or sized.bill.wall_seconds > one.bill.wall_seconds / 3
    assert sizer.for_deadline(1.0).chosen is None


def test_a_budget_buys_the_quickest_that_it_pays_for() -> None:
    sizer = Sizer(GPT2, tokens=1e10)
    usd = {n: sized.usd for n in (1, 2, 4, 8) if (sized := sizer._at(n)) is not None}
    most = max(value for value in usd.values() if value is not None)
    rich = sizer.for_budget(2 * most)
    assert rich.chosen is not None
    assert rich.chosen.bill.wall_seconds == min(s.bill.wall_seconds for s in rich.tried)
    assert sizer.for_budget(1e-3).chosen is None


def test_the_cheapest_count_costs_least_of_those_tried() -> None:
    found = Sizer(GPT2, tokens=1e10).cheapest()
    assert found.chosen is not None
    assert found.chosen.usd == min(s.usd for s in found.tried if s.usd is not None)
    assert {s.gpus for s in found.tried} | set(found.idle) == {1, 2, 4, 8}


def test_what_a_size_is_asked_for_is_checked() -> None:
    asked = {"model": "gpt2", "cluster": "h100-superpod", "gpus": 8, "seq": 512, "global_batch": 16}
    with pytest.raises(UserError, match="tokens"):
        api.size(**asked, deadline=60.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one of"):
        api.size(**asked, tokens=1e9, deadline=60.0, budget=5.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean"):
        api.size(**asked, objective="costs")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="budget"):
        api.size(**asked, tokens=1e9, budget=0.0)  # type: ignore[arg-type]


def test_every_neighbour_is_another_layout() -> None:
    given = parse_layout("dp4:zero1 tp2:sp pp2 mb1")
    near = list(neighbours(estimator(LLAMA), given))
    assert all(isinstance(x, Layout) and x.world == 16 for x in near)
    assert any(x.offload == "optimizer" for x in near)
