"""The two passes of a pair run at the same time, on communicators of their own, and compute what they compute one by one."""

from __future__ import annotations

import gc
import threading

import lane_workers as workers
import pytest
import torch
from fixtures import GPT_OSS, WORKLOAD

from meshwright.parallel.lanes import Lanes
from meshwright.spec.errors import UserError
from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed
from meshwright.train.recipe import Recipe
from meshwright.verify.difference import wrong_axes

CPU = torch.device("cpu")


def test_both_passes_are_under_way_at_once() -> None:
    met = threading.Barrier(2)
    Lanes(2, CPU, paired=True).together(lambda: _meet(met), lambda: _meet(met), (0, 1))


def _meet(met: threading.Barrier) -> None:
    met.wait(timeout=20)


def test_the_forward_is_run_by_the_caller_and_the_backward_always_by_the_same_other_thread() -> None:
    lanes, ran = Lanes(2, CPU, paired=True), []
    for _ in range(3):
        lanes.together(
            lambda: ran.append(("F", threading.get_ident())), lambda: ran.append(("B", threading.get_ident())), (0, 1)
        )
    assert {thread for name, thread in ran if name == "F"} == {threading.get_ident()}
    assert len({thread for name, thread in ran if name == "B"} - {threading.get_ident()}) == 1


def test_the_thread_ends_with_the_lanes() -> None:
    lanes, ran = Lanes(2, CPU, paired=True), []
    lanes.together(lambda: None, lambda held=lanes: ran.append(threading.current_thread()), (0, 1))
    (thread,) = ran
    assert thread.daemon
    del lanes
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_an_error_of_either_pass_is_raised(wrong: str) -> None:
    def fail() -> None:
        raise ValueError(wrong)

    def work() -> None:
        pass

    with pytest.raises(ValueError, match=wrong):
        Lanes(2, CPU, paired=True).together(
            fail if wrong == "forward" else work, fail if wrong == "backward" else work, (0, 1)
        )


@pytest.mark.parametrize(
    "layout",
    [
        "dp2 pp2x2:dualpipe-v ep2{} mb1",
        pytest.param("tp2:sp pp2x2:dualpipe-v ep2{} mb1 ac:norms", marks=pytest.mark.parity),
    ],
)
def test_pairs_compute_bit_by_bit_what_their_passes_do_one_by_one(layout: str) -> None:
    """Although every rank takes a different time over each of its collectives, so that no two issue them in the same order."""
    plain, hidden = (parse_layout(layout.format(mode) + " fp64") for mode in ("", ":async"))
    expected = run_distributed(workers.delayed, plain.world, GPT_OSS, WORKLOAD, plain)
    found = run_distributed(workers.delayed, hidden.world, GPT_OSS, WORKLOAD, hidden)
    for one, other in zip(found, expected, strict=True):
        assert one.figures == other.figures
        assert one.gradients.keys() == other.gradients.keys()
        assert all(torch.equal(one.gradients[name], other.gradients[name]) for name in one.gradients)
        assert one.at_once > 0
        assert other.at_once == 0
    orders = {rank.order for rank in found}
    assert len(orders) > 1, "all ranks issued their collectives in the same order, so nothing was tried"


def test_a_table_of_ones_own_says_nothing_of_pairs() -> None:
    recipe = Recipe(layout="dp2 pp2x2:dualpipe-v ep2:async mb1", schedule_csv="mine.csv", seq=16, global_batch=8)
    with pytest.raises(UserError, match=r"^schedule_csv mine.csv with ep2:async: .* leave :async out, or the table$"):
        _ = recipe.schedule


def test_what_goes_wrong_in_pairs_alone_is_blamed_on_pipeline_and_experts_together_with_the_ranks_they_borrow() -> None:
    layout = parse_layout("dp4 tp2 pp2x2:dualpipe-v ep2:async mb1")
    assert wrong_axes(layout, lambda part: part.async_ep) == ("dp x pp x ep", "tp x pp x ep")
    assert wrong_axes(layout, lambda part: part.ep > 1) == ("dp x ep", "tp x ep")


def test_lanes_share_no_communicator_with_each_other_or_with_reductions() -> None:
    layout = parse_layout("dp2 pp2x2:dualpipe-v ep2:async mb1 fp64")
    for communicators in run_distributed(workers.communicators, layout.world, GPT_OSS, layout):
        assert len(communicators) == len(set(communicators)) == 3
    plain = parse_layout("dp2 pp2x2:dualpipe-v ep2 mb1 fp64")
    for communicators in run_distributed(workers.communicators, plain.world, GPT_OSS, plain):
        assert len(communicators) == 3
        assert len(set(communicators)) == 1
