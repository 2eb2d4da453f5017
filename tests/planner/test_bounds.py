"""No layout takes less time or memory than its bounds say."""

from __future__ import annotations

import zlib
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from planner_cases import PROBLEMS, narrow_problem, random_problem

from meshwright.cost.estimate import Estimator
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.orders import ORDERS, OTHERS
from meshwright.planner.search import plain_layouts, relieved_layouts
from meshwright.planner.space import space_on
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import DENSE_AXES, Layout
from meshwright.spec.workload import Workload


@pytest.mark.parametrize("number", range(10))
def test_rank_orders_that_are_taken_for_one_cost_the_same_and_none_beats_what_any_order_could(number: int) -> None:
    model, cluster, work, gpus = narrow_problem(Random(number), largest=8000)
    estimator, space = Estimator(model, cluster, work), space_on(cluster, model, work, gpus, "bf16")
    every, closed = list(plain_layouts(space)), ClosedForm(space, estimator)
    at, order = space.orders(np.arange(len(space.local))).others()
    if len(at):
        assert (closed.least_in_any_order[at] <= closed.ordered(at, order).least_seconds * (1 + 1e-9)).all()
    for at_one, pipeline, sharding in Random(0).sample(every, min(len(every), 60)):
        orders, steps = space.orders(np.array([at_one])), dict[int, list[float]]()
        for number in (0, *(other for other in OTHERS if orders.can(other)[0])):
            layout = replace(space.layout(at_one, pipeline, sharding), order=ORDERS[number])
            steps.setdefault(int(orders.links(number)[0]), []).append(estimator.played(layout).step_time_s)
        assert all(max(alike) == pytest.approx(min(alike), rel=1e-12) for alike in steps.values())


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p[0]} {p[5]} on {p[2]} {p[1]}")
def test_no_layout_is_below_its_bound(problem: tuple[str, str, int, int, int, str]) -> None:
    """Neither in time nor in memory, without relief, with any, or in another order of ranks; playing without tables gives what an
    estimate gives."""
    model, cluster, gpus, seq, batch, precision = problem
    loaded, machine, work = load_model(model), load_cluster(cluster), Workload(seq, batch)
    estimator = Estimator(loaded, machine, work)
    space = space_on(machine, loaded, work, gpus, precision)  # type: ignore[arg-type]
    usual, random = ClosedForm(space, estimator), Random(0)
    at, order = space.orders(np.arange(len(space.local))).others()
    forms = [usual] + ([usual.ordered(at, order)] if len(at) else [])
    for closed in forms:
        for bounds in closed.price(np.arange(len(closed.space.local))):
            i = random.randrange(len(bounds.at))
            within = bounds_hold(estimator, bounds, i)
            assert closed.least_seconds[bounds.at[i]] <= bounds.seconds[i] * (1 + 1e-9), within
            assert closed is usual or usual.least_in_any_order[at[bounds.at[i]]] <= bounds.seconds[i] * (1 + 1e-9), within
            for eased in (closed.recomputed(bounds), closed.emptied(bounds)):
                bounds_hold(estimator, eased, i)


@pytest.mark.parametrize("number", range(12))
def test_no_layout_with_relief_is_below_its_bound(number: int) -> None:
    """Of layouts that do not fit: with each relief, as few layers as may fit, and one fewer surely does not."""
    model, cluster, work, gpus = random_problem(Random(number), largest=60_000)
    estimator, random = Estimator(model, cluster, work), Random(number)
    space = space_on(cluster, model, work, gpus, "bf16")
    limit = cluster.accelerator.memory_bytes
    closed = ClosedForm(space, estimator)
    for bounds in closed.price(np.arange(len(space.local))):
        short = np.flatnonzero(bounds.bytes > limit)
        found = closed.relieve(bounds, short)
        assert (found.bytes <= limit).all()
        for i in random.sample(range(len(found.at)), min(len(found.at), 4)):
            layout = bounds_hold(estimator, found, i)
            if found.layers[i] > 1:
                fewer = found.layout(i, int(found.layers[i]) - 1)
                assert estimator.played(fewer).peak_bytes > limit, layout
        reached = {(int(at), int(sharding)) for at, sharding in zip(found.at, found.sharding, strict=True)}
        for i in random.sample(list(short), min(len(short), 2)):
            if (int(bounds.at[i]), int(bounds.sharding[i])) not in reached:
                sharding = space.shardings[bounds.sharding[i]]
                every = relieved_layouts(space, int(bounds.at[i]), bounds.pipeline, sharding)
                assert not any(estimator.fits(x) for x in every if x.order == DENSE_AXES)


def bounds_hold(estimator: Estimator, bounds: Bounds, i: int) -> Layout:
    layout = bounds.layout(i)
    played = estimator.played(layout)
    assert bounds.seconds[i] <= played.step_time_s * (1 + 1e-9), layout
    assert bounds.bytes[i] <= played.peak_bytes * (1 + 1e-9), layout
    if zlib.crc32(str(layout).encode()) % 10 == 0:
        whole = estimator.estimate(layout)
        assert played.step_time_s == pytest.approx(whole.step_time_s, rel=1e-12)
        assert (played.peak_bytes, played.fits) == (whole.peak_bytes, whole.fits)
    return layout
