"""The planner answers with the quickest layout there is, prices only legal ones, and says why each other loses."""

from __future__ import annotations

import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, groupby, permutations, product
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import api
from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate
from meshwright.planner.arrays import Ints
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.explain import reason_against
from meshwright.planner.orders import ORDERS, OTHERS
from meshwright.planner.rules.reshape import order_has_price
from meshwright.planner.search import CLOSE, SMALL_SPACE, Plan, legal_layouts, plain_layouts, plan, relieved_layouts
from meshwright.planner.space import MIN_TOKENS, Relief, divisors, legal_space, space_on
from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import DENSE_AXES, OFFLOADS, RECOMPUTE_PARTS, Layout
from meshwright.spec.legality import check_layout, check_world, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


@cache
def llama_70b() -> Plan:
    return api.plan(model="llama-3-70b", cluster="h100-superpod", gpus=640, seq=4096, global_batch=1280)


# --- the answer


def test_70b_on_640_h100_is_no_slower_than_what_a_person_would_take() -> None:
    found = llama_70b()
    usual = api.estimate(
        model="llama-3-70b",
        cluster="h100-superpod",
        gpus=640,
        seq=4096,
        global_batch=1280,
        layout="dp20:zero1 tp8:sp pp4 mb1",
    )
    assert found.best is not None
    assert found.best.estimate.fits
    assert usual.fits
    assert found.best.estimate.layout.world == 640
    assert found.best.estimate.step_time_s <= usual.step_time_s
    assert found.searched > found.fitting > 100


PROBLEMS = [
    ("llama-3-8b", "h100-superpod", 4, 2048, 8, "bf16"),
    ("gpt2", "h100-superpod", 4, 1024, 16, "bf16"),
    ("llama-small", "local", 4, 256, 16, "bf16"),
    ("llama-small", "local", 4, 256, 16, "fp32"),
    ("llama-3.2-1b", "mi300x-roce", 12, 1024, 12, "bf16"),
    ("deepseek-v2-lite", "h100-superpod", 4, 512, 2, "bf16"),
    ("qwen3-0.6b", "h100-superpod", 6, 2048, 12, "bf16"),
    ("gpt2-xl", "h100-superpod", 8, 512, 16, "bf16"),
]


def some_layouts(model: str, cluster: str, gpus: int, seq: int, batch: int, count: int) -> list[Layout]:
    """Of different combinations, each with some relief or none, and its ranks in some order."""
    space, random = space_on(load_cluster(cluster), load_model(model), Workload(seq, batch), gpus, "bf16"), Random(0)
    every = list(plain_layouts(space))
    return [random.choice(list(relieved_layouts(space, *one))) for one in random.sample(every, min(len(every), count))]


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


MODELS = {
    "dense": ("gpt2", "opt-1.3b", "llama-small", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "qwen3-0.6b", "mistral-7b"),
    "experts": ("mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"),
}
MACHINES = ("a100-superpod", "h100-superpod", "b200-superpod", "gb200-nvl72", "aws-p5", "mi300x-roce", "local")


def random_problem(random: Random, largest: int) -> tuple[Model, Cluster, Workload, int]:
    """A model of the catalogue with some of its layers, on some accelerators of a cluster, often with so little memory that only a
    part of its 200 to `largest` legal layouts fit."""
    names = random.choice(list(MODELS.values()))
    while True:
        model, layers = load_model(random.choice(names)), random.randint(2, 8)
        moe = tuple(range(random.randint(0, 1), layers)) if model.moe_layers else ()
        model = replace(model, layers=layers, windows=model.windows[:layers], moe_layers=moe)
        cluster = load_cluster(random.choice(MACHINES))
        uneven = random.choice((1.0, 1.5)) if moe else 1.0
        work = Workload(random.choice((256, 512, 1000, 1024, 2048)), random.randint(1, 16), uneven)
        gpus = random.choice((2, 3, 4, 6, 8, 12, 16))
        if (gpus > 4 and cluster.name == "local") or (model.rope is None and work.seq > model.max_positions):
            continue
        space = space_on(cluster, model, work, gpus, "bf16")
        if not len(space.local) or not 200 <= space.size() <= largest:
            continue
        if random.random() < 0.75:
            some = random.choice(list(legal_layouts(space)))
            memory = {"memory_bytes": Estimator(model, cluster, work).played(some).peak_bytes}
            cluster = cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update=memory)})
        return model, cluster, work, gpus


def narrow_problem(random: Random, largest: int) -> tuple[Model, Cluster, Workload, int]:
    """Two or four layers on nodes of 2 or 4 accelerators that share one slow port: it matters which ranks share a node."""
    while True:
        names = ("gpt2", "llama-small", "llama-3.2-1b", "llama-3-8b", "qwen3-0.6b", "mixtral-8x7b")
        model, few = few_layers(load_model(random.choice(names)), random.choice((2, 4))), random.choice((2, 4))
        cluster, gpus = load_cluster("h100-superpod"), random.choice((4, 8, 16))
        rate = random.choice((1e8, 5e8, 2e9, 1e10))
        node = cluster.node.model_copy(update={"accelerators": few, "nics": 1, "nic_bandwidth": rate})
        cluster = cluster.model_copy(update={"node": node, "fabric": cluster.fabric.model_copy(update={"domain": few})})
        work = Workload(random.choice((256, 1024, 8192) if model.rope else (1024,)), random.choice((1, 2, 4, 8, 16, 32)))
        space = space_on(cluster, model, work, gpus, "bf16")
        if not len(space.local) or space.size() > largest:
            continue
        some = space.layout(*random.choice(list(plain_layouts(space))))
        memory = {"memory_bytes": Estimator(model, cluster, work).played(some).peak_bytes}
        return model, cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update=memory)}), work, gpus


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


def test_candidates_are_the_best_and_its_runners_up_in_order() -> None:
    found = llama_70b()
    assert found.candidates[0] == found.best
    assert len(found.candidates) == 5
    times = [c.estimate.step_time_s for c in found.candidates]
    assert times == sorted(times)
    assert all(c.estimate.fits for c in found.candidates)
    assert len({c.estimate.layout for c in found.candidates}) == 5
    more = api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=512, global_batch=16, top=20)
    assert len(more.candidates) == 20
    only = api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=512, global_batch=16, top=1)
    assert only.candidates == (only.best,)


def test_the_answer_turns_into_json_and_progress_is_told() -> None:
    told: list[int] = []
    found = api.plan(model="gpt2", cluster="local", gpus=4, seq=128, global_batch=8, progress=told.append)
    assert told == sorted(told)
    assert told[-1] <= found.priced <= found.searched
    d = json.loads(json.dumps(found.as_dict()))
    assert set(d) >= {"best", "candidates", "alternatives", "searched", "priced", "fitting", "played", "gap", "seconds"}
    assert d["best"]["layout"] == d["candidates"][0]["layout"]
    assert all(row["reason"] for row in (*d["candidates"], *d["alternatives"]))
    assert all(row["name"] for row in d["alternatives"])


# --- the reasons


def sensible(reason: str) -> None:
    """One line that names a figure, and no difference of nothing."""
    assert reason
    assert "\n" not in reason
    assert not re.search(r"(?<![\d.])-?0(\.0+)? m?s longer|-\d[\d.]* m?s longer", reason), reason
    bubble = re.search(r"bubble [^:]*: ([\d.]+)% of the step, ([\d.]+)% in the best", reason)
    assert not bubble or float(bubble[1]) * 1.0005 >= float(bubble[2]), reason


def test_every_alternative_has_its_reason() -> None:
    found = llama_70b()
    assert found.best is not None
    names = [name for name, _ in found.alternatives]
    best = found.best.estimate.layout
    taken = {"no pipeline": best.pp == 1, "no recompute": best.recompute == "none", "no ZeRO": best.zero == 0}
    taken = {name for name, is_so in taken.items() if is_so}
    assert len(set(names)) == len(names) >= 4
    for name, candidate in found.alternatives:
        assert candidate.estimate.layout != found.best.estimate.layout
        assert not candidate.estimate.fits or candidate.estimate.step_time_s >= found.best.estimate.step_time_s
        sensible(candidate.reason)
        x = candidate.estimate.layout
        meaning = {
            "no pipeline": x.pp == 1,
            "no tensor parallel": x.tp == 1,
            "full recompute": x.recompute == "full",
            "no ZeRO": x.zero == 0,
        }
        assert meaning.get(name, True)
        assert name not in taken, "the best is of that kind itself"
    for candidate in found.candidates[1:]:
        sensible(candidate.reason)


@pytest.mark.parametrize(
    ("model", "cluster", "gpus", "seq", "batch"), [p[:5] for p in PROBLEMS[:3]] + [("gpt2-xl", "h100-superpod", 8, 512, 24)]
)
def test_every_layout_that_loses_has_a_sensible_reason(model: str, cluster: str, gpus: int, seq: int, batch: int) -> None:
    loaded, machine, work = load_model(model), load_cluster(cluster), Workload(seq, batch)
    estimator = Estimator(loaded, machine, work)
    every = [estimator.estimate(x) for x in some_layouts(model, cluster, gpus, seq, batch, 300)]
    best = min((e for e in every if e.fits), key=lambda e: e.step_time_s)
    for e in every:
        reason = reason_against(e, best)
        sensible(reason)
        assert reason.startswith("does not fit") == (not e.fits)
        assert reason.startswith("as quick as the best") == (e.fits and e.step_time_s <= best.step_time_s * 1.0005)


def test_a_layout_that_does_not_fit_is_told_what_takes_the_room() -> None:
    e = api.estimate(model="llama-3-8b", cluster="h100-superpod", seq=4096, global_batch=8, layout="dp8 mb1")
    reason = reason_against(e, None)
    assert re.fullmatch(r"does not fit: stage 0 needs (\d+\.\d) GiB of 80\.0, (\d+\.\d) of it optimizer", reason)
    assert f"{e.peak_bytes / 2**30:.1f} GiB" in reason


# --- when there is none


def test_nothing_fits_names_the_nearest_and_what_it_lacks() -> None:
    found = api.plan(model="llama-3-405b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=8)
    assert found.best is None
    assert found.fitting == 0 < found.searched
    assert found.alternatives == ()
    [nearest] = found.candidates
    assert not nearest.estimate.fits
    estimator = Estimator(load_model("llama-3-405b"), load_cluster("h100-superpod"), Workload(4096, 8))
    others = some_layouts("llama-3-405b", "h100-superpod", 8, 4096, 8, 200)
    held = [x for x in others if estimator.host_holds(x)]
    assert len(held) > 50
    assert nearest.estimate.peak_bytes <= min(estimator.played(x).peak_bytes for x in held)
    assert re.search(
        r"needs \d+\.\d GiB of 80\.0, \d+\.\d of it (optimizer|parameters|gradients|activations)", nearest.reason
    )
    assert found.as_dict()["best"] is None


def test_no_more_is_offloaded_than_the_host_holds() -> None:
    model, cluster, work = load_model("llama-3-70b"), load_cluster("h100-superpod"), Workload(8192, 16)
    found = plan(model, cluster, work, 8)
    assert found.best is not None
    best = found.best.estimate
    assert best.offload is not None
    assert best.layout.offload == "optimizer"  # 12 bytes of each of 70.6e9 parameters, over 8 ranks
    assert best.offload.kept_bytes == pytest.approx(12 * 70.6e9 / 8, rel=0.01)
    assert best.host_limit_bytes == 2e12 / 8
    node = cluster.node.model_copy(update={"host_memory_bytes": 800e9})
    small = cluster.model_copy(update={"node": node})
    estimator = Estimator(model, small, work)
    refused = estimator.estimate(best.layout)
    assert refused.peak_bytes <= refused.memory_limit_bytes
    assert not refused.fits
    assert not estimator.fits(best.layout)
    assert not estimator.played(best.layout).fits
    assert (
        reason_against(refused, None)
        == "does not fit: a rank offloads 98.6 GiB, and the host has 93.1 for each of its ranks"
    )
    nothing = plan(model, small, work, 8)
    assert nothing.best is None
    assert Estimator(model, small, work).host_holds(nothing.candidates[0].estimate.layout)
    unknown = cluster.model_copy(update={"node": cluster.node.model_copy(update={"host_memory_bytes": None})})
    assert Estimator(model, unknown, work).fits(best.layout)


def test_layouts_that_fit_by_the_closed_form_alone_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was thought to fit and does not, once its buckets are planned, is passed over; if nothing is left, that is said."""
    bound = ClosedForm.price

    def optimistic(self: ClosedForm, at: Ints, **given: Any) -> Iterator[Bounds]:
        return (replace(b, bytes=np.zeros_like(b.bytes)) for b in bound(self, at, **given))

    monkeypatch.setattr(ClosedForm, "price", optimistic)
    found = api.plan(model="llama-3-405b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=8)
    assert found.best is None
    assert "does not fit" in found.candidates[0].reason
    found = api.plan(model="llama-3-8b", cluster="h100-superpod", gpus=8, seq=4096, global_batch=64)
    assert found.best is not None
    assert found.best.estimate.fits
    assert len(found.candidates) == 5


@pytest.mark.parametrize(
    ("gpus", "batch", "model"), [(37, 8, "llama-3-8b"), (1009, 8, "llama-3-8b"), (26, 4, "gpt2"), (83, 5, "llama-3-70b")]
)
def test_no_legal_layout_names_the_nearest_counts(gpus: int, batch: int, model: str) -> None:
    with pytest.raises(UserError) as refused:
        api.plan(model=model, cluster="h100-superpod", gpus=gpus, seq=1024, global_batch=batch)
    message = str(refused.value)
    assert "\n" not in message
    assert f"no layout of {gpus} ranks" in message
    assert f"global batch of {batch}" in message
    offered = [int(n) for n in re.search(r"try (.*) ranks", message)[1].split(" or ")]  # type: ignore[index]
    work = Workload(1024, batch)
    legal = [n for n in range(gpus, 0, -1) if len(legal_space(load_model(model), work, n, "bf16").local)]
    assert offered == legal[: len(offered)] != []


def test_when_no_count_would_help_the_reason_is_the_models_own() -> None:
    with pytest.raises(UserError) as refused:
        api.plan(model="gpt2", cluster="h100-superpod", gpus=4, seq=2048, global_batch=8)
    assert "1024 learned positions" in str(refused.value)
    assert "try  ranks" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"seq": 0}, "seq must be at least 1, got 0"),
        ({"global_batch": -2}, "global_batch must be at least 1, got -2"),
        ({"model": "gtp2"}, "unknown model 'gtp2': did you mean gpt2"),
        ({"cluster": "h100"}, "unknown cluster 'h100'"),
        ({"cluster": "local", "gpus": 8}, "local is one node of 4 ranks"),
        ({"precision": "fp64", "model": "gpt2"}, "h100-sxm has no fp64 rate"),
        ({"precision": "fp4"}, "h100-sxm has no fp4 rate; it has fp32, tf32, bf16, fp16, fp8, int8"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, object], said: str) -> None:
    asked = {"model": "llama-tiny", "cluster": "h100-superpod", "gpus": 4, "seq": 128, "global_batch": 8} | changes
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        api.plan(**asked)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


# --- the space


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(("gpt2", "opt-1.3b", "llama-3-8b", "mixtral-8x7b")),
    gpus=st.integers(1, 8),
    batch=st.integers(1, 8),
    seq=st.sampled_from((96, 1024, 1000)),
    offloads=st.booleans(),
)
def test_the_space_is_every_legal_layout_once(model: str, gpus: int, batch: int, seq: int, offloads: bool) -> None:
    loaded, work = few_layers(load_model(model), 2), Workload(seq, batch)
    space = legal_space(loaded, work, gpus, "bf16", 2, offloads)
    found = list(legal_layouts(space))
    assert len(set(found)) == len(found) == space.size()
    for layout in found:
        check_layout(layout, loaded, work)
        check_world(layout, gpus)
        check_micro_batches(layout.schedule, layout.pp, micro_batches(layout, work))
        refuse_unbuilt(layout)
    assert set(found) == set(brute_force(loaded, work, gpus, offloads))


def few_layers(model: Model, layers: int) -> Model:
    moe = tuple(range(layers)) if model.moe_layers else ()
    return replace(model, layers=layers, windows=model.windows[:layers], moe_layers=moe)


def brute_force(model: Model, work: Workload, gpus: int, offloads: bool) -> Iterator[Layout]:
    """Every combination of everything, of which the legal ones are kept."""
    pipelines = [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2), *(("interleaved", v) for v in range(2, 7))]
    experts = list(product(divisors(model.experts.count), divisors(8))) if model.experts else [(1, 1)]
    for dp, tp, pp, cp in product(divisors(gpus), repeat=4):
        if dp * tp * pp * cp != gpus or (cp > 1 and work.seq // cp < MIN_TOKENS):
            continue
        for ulysses, (ep, etp), mb in product(divisors(cp), experts, divisors(work.global_batch)):
            for sp, (zero, shard), (schedule, chunks) in product(
                (False, True), ((0, None), (1, None), (2, None), (3, None), (1, 2), (2, 2), (3, 2)), pipelines
            ):
                if (pp == 1 and schedule != "1f1b") or (shard and tp * cp != 1):
                    continue  # a pipeline's; groups of a domain of 2
                try:
                    layout = Layout(
                        dp=dp, tp=tp, pp=pp, cp=cp, cp_ulysses=ulysses, ep=ep, etp=etp, micro_batch=mb, sp=sp,
                        zero=zero, zero_shard=shard, schedule=schedule, chunks=chunks,  # type: ignore[arg-type]
                    )  # fmt: skip
                    check_layout(layout, model, work)
                    check_micro_batches(schedule, pp, micro_batches(layout, work))
                except UserError:
                    continue
                yield from relieved_by_force(layout, model, work, offloads)


def relieved_by_force(layout: Layout, model: Model, work: Workload, offloads: bool) -> Iterator[Layout]:
    held = -(-model.layers // (layout.pp * layout.chunks))
    lists = [parts for n in range(1, 5) for parts in combinations(RECOMPUTE_PARTS, n)]
    modes = [("full", ("core",)), *(("selective", parts) for parts in lists)]
    again = [(mode, parts, n) for mode, parts in modes for n in (*range(1, held), None)]
    for (recompute, parts, layers), offload, order in product(
        [("none", ("core",), None), *again], OFFLOADS if offloads else ("none",), permutations(DENSE_AXES)
    ):
        split = [axis for axis in order if layout.degree(axis) > 1]
        usual = [axis for axis in DENSE_AXES if axis in split]
        if order != DENSE_AXES and (split == usual or order != (*split, *(x for x in DENSE_AXES if x not in split))):
            continue
        try:
            found = replace(
                layout, recompute=recompute, recompute_parts=parts, recompute_layers=layers, offload=offload, order=order,  # type: ignore[arg-type]
            )  # fmt: skip
            check_layout(found, model, work)
        except UserError:
            continue
        if order == DENSE_AXES or order_has_price(found, 2):
            yield found


def test_a_relief_includes_what_gives_up_less() -> None:
    kept, norms = Relief(), Relief("selective", ("norms",))
    both, mlp, full = Relief("selective", ("norms", "activation")), Relief("selective", ("mlp",)), Relief("full")
    assert all(full.includes(less) for less in (kept, norms, both, mlp, full))
    assert both.includes(norms)
    assert not norms.includes(both)
    assert mlp.includes(Relief("selective", ("activation",)))
    assert not mlp.includes(norms)
    assert not mlp.includes(full)
    assert not kept.includes(norms)
    away = replace(norms, offload="optimizer")
    assert away.includes(norms)
    assert away.includes(Relief(offload="optimizer"))
    assert not norms.includes(away)
    assert not full.includes(Relief(offload="optimizer"))


@given(st.integers(1, 5000))
def test_divisors(n: int) -> None:
    assert list(divisors(n)) == [d for d in range(1, n + 1) if n % d == 0]


def test_estimates_of_a_plan_are_those_of_estimate() -> None:
    found = llama_70b()
    assert found.best is not None
    best: Estimate = found.best.estimate
    again = api.estimate(model="llama-3-70b", cluster="h100-superpod", seq=4096, global_batch=1280, layout=str(best.layout))
    assert again.as_dict() == best.as_dict()
