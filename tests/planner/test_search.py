"""The search answers as playing every legal layout does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import groupby
from random import Random

import pytest
from planner_cases import PROBLEMS, narrow_problem, random_problem

from meshwright.cost.estimate import Estimator
from meshwright.planner.search import CLOSE, SMALL_SPACE, plain_layouts, plan, relieved_layouts
from meshwright.planner.space import space_on
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import DENSE_AXES, Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


@pytest.mark.parametrize(
    ("model", "cluster", "gpus", "seq", "batch", "precision"),
    PROBLEMS,
    ids=[f"{p[0]} {p[5]} on {p[2]} {p[1]}" for p in PROBLEMS],
)
def test_the_answer_is_that_of_playing_every_legal_layout(
    model: str, cluster: str, gpus: int, seq: int, batch: int, precision: str
) -> None:
    compare_with_playing_all(
        load_model(model), load_cluster(cluster), Workload(seq, batch), gpus, precision, every_layer=False
    )


@pytest.mark.parametrize("number", range(24))
def test_random_problems_have_the_answer_of_playing_every_legal_layout(number: int) -> None:
    compare_with_playing_all(*random_problem(Random(number), largest=8000))


@pytest.mark.parametrize("number", range(12))
def test_ranks_are_ordered_as_playing_every_order_says(number: int) -> None:
    compare_with_playing_all(*narrow_problem(Random(number), largest=8000))


def test_where_nodes_are_narrow_other_rank_orders_are_sometimes_the_best() -> None:
    found = [plan(*narrow_problem(Random(number), largest=8000)).best for number in range(24)]
    assert sum(best is not None and best.estimate.layout.order != DENSE_AXES for best in found) > 1


@pytest.mark.parity
@pytest.mark.parametrize("number", range(100, 220))
def test_more_and_larger_random_problems_have_the_answer_of_playing_every_legal_layout(number: int) -> None:
    compare_with_playing_all(*random_problem(Random(number), largest=40_000))


def compare_with_playing_all(
    model: Model, cluster: Cluster, work: Workload, gpus: int, precision: str = "bf16", *, every_layer: bool = True
) -> None:
    """`every_layer`: also what cannot be quicker than with fewer layers that run again, or without relief."""
    estimator = Estimator(model, cluster, work)
    space = space_on(cluster, model, work, gpus, precision)  # type: ignore[arg-type]
    fitting = []  # the quickest of those that differ in relief and rank order alone
    for plain in plain_layouts(space):
        layouts = relieved_layouts(space, *plain)
        each = (estimator.played(x) for x in (layouts if every_layer else fewest_layers(estimator, layouts)))
        fitting += [min(steps)] if (steps := [e.step_time_s for e in each if e.fits]) else []
    found = plan(model, cluster, work, gpus, precision=precision)  # type: ignore[arg-type]
    assert found.searched == space.size() >= found.played
    if not fitting:
        assert found.best is None
        return
    assert found.best is not None
    assert found.best.estimate.step_time_s <= min(fitting) * (1 + found.gap) / (1 - found.gap) + 1e-12
    assert found.gap <= CLOSE
    if found.gap == 0:
        assert found.best.estimate.step_time_s == pytest.approx(min(fitting), rel=1e-12)
    if found.searched <= SMALL_SPACE:
        steps = [candidate.estimate.step_time_s for candidate in found.candidates]
        assert steps == pytest.approx(sorted(fitting)[:5], rel=1e-12)
    assert found.best.estimate == estimator.estimate(found.best.estimate.layout)


def fewest_layers(estimator: Estimator, layouts: Iterable[Layout]) -> Iterator[Layout]:
    """Of layouts that differ in rank order and relief: those without relief, if they fit; else, of each relief, those with the fewest
    layers that do."""
    for _, alike in groupby(layouts, key=lambda x: (x.recompute, x.recompute_parts, x.offload)):
        by_layers = [list(orders) for _, orders in groupby(alike, key=lambda x: x.recompute_layers)]
        if estimator.fits(by_layers[-1][0]):
            least = by_layers[bisect_left(by_layers, True, key=lambda orders: estimator.fits(orders[0]))]
            yield from least
            if least[0].recompute == least[0].offload == "none":
                return
