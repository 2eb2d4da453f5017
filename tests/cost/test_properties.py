"""What must hold of every price, whatever the model, the machine and the layout: more of anything never hurts, nothing is quicker
than its parts, and what one rank sends another receives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.cost.estimate import Estimator
from meshwright.cost.traffic import step_traffic
from meshwright.planner.search import legal_layouts, plan
from meshwright.planner.space import legal_space
from meshwright.schedule.orders import check_micro_batches, layout_schedule
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.groups import expert_groups, groups, stage_of
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import SCHEDULES, Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

H100 = load_cluster("h100-superpod")
WORK = Workload(seq=2048, global_batch=96)
LAYERS = 16


@cache
def model(name: str) -> Model:
    """Of the catalogue's widths, with few layers: pricing goes by kinds of layers."""
    whole = load_model(name)
    return replace(
        whole, layers=LAYERS, windows=whole.windows[:LAYERS], moe_layers=tuple(x for x in whole.moe_layers if x < LAYERS)
    )


DENSE = [
    "mb1",
    "dp8:zero1 mb2",
    "dp12:zero3 mb1 ac:full",
    "dp16:zero2 tp2 mb2",
    "dp12:zero3x4 tp2 mb1",
    "tp8:sp dp4 mb1 ac:selective",
    "tp16:sp dp2 mb4",
    "dp2:zero1 pp4:1f1b tp4:sp mb2",
    "dp4 pp4:gpipe tp2 mb1",
    "dp3 tp2 pp4x2:interleaved mb1",
    "dp2 tp2:sp pp8x2:zb-v mb1",
    "dp4:zero1 pp4:zb-h1 mb2",
    "dp2 tp2:sp pp4x2:dualpipe-v mb1",
    "dp2 tp2:sp pp2 cp4:ring mb1",
    "dp4 cp4:ulysses mb2",
    "tp8:sp dp4 mb1 order:dp-tp-cp-pp",
]
CPU = ["dp4 mb2", "dp2:zero1 tp2:sp mb1", "pp4 mb1", "pp2x2:zb-v tp2 mb1"]
EXPERTS = ["dp8:zero1 ep8 mb1", "dp16:zero1 tp2:sp pp2 ep4 mb1", "dp8 tp4:sp ep8 etp4 pp2 mb2"]
EXPERTS += ["dp8:zero1 pp4x2:dualpipe-v ep8:async mb1", "dp4 tp4:sp pp2x2:dualpipe-v ep8:async etp2 mb2"]
MACHINES = st.sampled_from(["a100-superpod", "h100-superpod", "gb200-nvl72", "aws-p5", "mi300x-roce"])
CASES = st.one_of(
    st.tuples(st.sampled_from(["opt-6.7b", "llama-3-8b", "llama-3-70b"]), MACHINES, st.sampled_from(DENSE)),
    st.tuples(st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b"]), MACHINES, st.sampled_from(EXPERTS)),
    st.tuples(st.just("llama-3.2-1b"), st.just("local"), st.sampled_from(CPU)),
)
RATES = ["scale-up", "nic", "memory", "flops"]
Case = tuple[str, str, str]


def faster(cluster: Cluster, rate: str, by: float) -> Cluster:
    """`cluster` with one of its rates `by` times as high."""
    part, node = cluster.accelerator, cluster.node
    if rate == "nic":
        return cluster.model_copy(update={"node": node.model_copy(update={"nic_bandwidth": node.nic_bandwidth * by})})
    if rate == "scale-up":
        names = ("bandwidth", "pair_bandwidth", "effective_bandwidth")
        links = {name: value * by for name in names if (value := getattr(part.scale_up, name))}
        changed: dict[str, object] = {"scale_up": part.scale_up.model_copy(update=links)}
    elif rate == "memory":
        changed = {"memory_bandwidth": part.memory_bandwidth * by}
    else:
        changed = {"peak_flops": {name: value * by for name, value in part.peak_flops.items()}}
    return cluster.model_copy(update={"accelerator": part.model_copy(update=changed)})


# --- more is never worse


@pytest.mark.parametrize("rate", RATES)
@settings(deadline=None, max_examples=40)
@given(case=CASES, by=st.floats(1.01, 100))
def test_a_higher_rate_is_never_slower_and_a_lower_one_never_faster(rate: str, case: Case, by: float) -> None:
    name, machine, layout = case
    slow, usual, fast = (
        Estimator(model(name), faster(load_cluster(machine), rate, x), WORK).played(parse_layout(layout)).step_time_s
        for x in (1 / by, 1.0, by)
    )
    assert fast <= usual * (1 + 1e-12)
    assert usual <= slow * (1 + 1e-12)


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b"])
def test_with_more_memory_whatever_fitted_fits_and_the_best_is_no_slower(name: str) -> None:
    cluster, work = load_cluster("h100-superpod"), Workload(1024, 4)
    few = replace(model(name), layers=4, windows=(), moe_layers=tuple(range(4)) if model(name).moe_layers else ())
    every = list(legal_layouts(legal_space(few, work, 4, "bf16", cluster.fabric.domain)))
    some = Random(0).sample(every, min(len(every), 100))
    fitted: set[Layout] = set()
    best = float("inf")
    for gib in (8, 12, 16, 24, 40, 80):
        part = cluster.accelerator.model_copy(update={"memory_bytes": gib * 2**30})
        machine = cluster.model_copy(update={"accelerator": part})
        estimator = Estimator(few, machine, work)
        fitting = {x for x in some if estimator.played(x).fits}
        assert fitted <= fitting
        found = plan(few, machine, work, 4, top=1).best
        assert found is not None or not fitting
        assert found is not None or best == float("inf")
        if found is not None:
            assert found.estimate.step_time_s <= best * (1 + 1e-12)
            best = found.estimate.step_time_s
        fitted = fitting
    assert fitted


# --- no quicker than its parts


@settings(deadline=None, max_examples=60)
@given(case=CASES, rate=st.sampled_from(RATES), by=st.floats(1 / 1000, 1))
def test_a_step_is_no_quicker_than_its_longest_chain_or_any_stage_or_link(case: Case, rate: str, by: float) -> None:
    name, machine, text = case
    layout = parse_layout(text)
    estimator = Estimator(model(name), faster(load_cluster(machine), rate, by), WORK)
    e = estimator.estimate(layout)
    timeline, least = e.timeline, 1 - 1e-12
    assert timeline is not None
    assert e.step_time_s == pytest.approx(estimator.played(layout).step_time_s, rel=1e-12)
    assert e.step_time_s >= (timeline.end + e.breakdown["optimizer"]) * least
    assert e.step_time_s >= e.breakdown["compute"] * least
    schedule, chunks = timeline.schedule, [one for its in timeline.seconds for one in its]
    assert timeline.end >= max(timeline.busy(stage) for stage in range(layout.pp)) * least
    hops = sum(
        (after := schedule.after(stage, chunk)) is not None and after[0] != stage
        for stage in range(schedule.stages)
        for chunk in range(schedule.chunks)
    )
    put_off = sum(one.weight or 0.0 for one in chunks) if schedule.splits_backward else 0.0
    chain = sum(one.forward + one.backward for one in chunks) - put_off + 2 * hops * timeline.send
    assert timeline.end >= chain * least
    for row in e.collectives:  # each on one link, so that they run in turn
        assert row.time_s * least <= e.step_time_s, row
        if (row.axis, row.op) != ("pp", "send"):
            assert 0 <= row.exposed_s <= row.time_s


# --- memory


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(["llama-3-8b", "opt-6.7b", "mixtral-8x7b"]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    pp=st.sampled_from([1, 2, 4]),
    chunks=st.integers(2, 4),
    micro=st.sampled_from([1, 2, 4]),
    times=st.integers(1, 18),
    modes=st.sampled_from(["", "tp2:sp", "dp2:zero1", "dp2:zero3", "ac:full", "cp2:ring tp2"]),
)
def test_twice_the_micro_batch_takes_no_less_memory(
    name: str, schedule: str, pp: int, chunks: int, micro: int, times: int, modes: str
) -> None:
    """Of as many micro-batches. Fewer that are larger may take less at the fullest moment: when the first stage makes the embedding's
    gradient, which knows no sequences, fewer of them are there."""
    layout = parse_layout(f"{modes} mb{micro}")
    chunks = {"interleaved": chunks, "zb-v": 2, "dualpipe-v": 2}.get(schedule, 1)
    assume(pp > 1 or schedule == "1f1b")
    layout = replace(layout, pp=pp, schedule=schedule, chunks=chunks)
    try:
        check_micro_batches(schedule, pp, times)
    except ValueError:
        assume(False)

    def peak(micro: int) -> int:
        work = Workload(1024, layout.dp * micro * times)
        return Estimator(model(name), H100, work).played(replace(layout, micro_batch=micro)).peak_bytes

    assert peak(2 * micro) > peak(micro)


# --- what is sent is received


@settings(deadline=None, max_examples=60)
@given(case=CASES)
def test_what_one_rank_sends_another_receives(case: Case) -> None:
    name, machine, text = case
    layout = parse_layout(text)
    programs, m = Estimator(model(name), load_cluster(machine), WORK).programs(layout), micro_batches(layout, WORK)
    schedule = layout_schedule(layout, m)
    sent: Counter[tuple[object, ...]] = Counter()
    received: Counter[tuple[object, ...]] = Counter()
    of_stage = [0] * layout.pp
    for stage, actions in enumerate(schedule.actions):
        for action in (a for a in actions if not a.kind.is_compute):
            peer = schedule.peer(stage, action)
            if action.kind.is_send:
                sent[stage, peer, action.kind, action.micro_batch] += 1
                of_stage[stage] += 1
            else:
                received[peer, stage, action.kind.match, action.micro_batch] += 1
    assert sent == received
    assert [m * len(program.boundary) for program in programs] == of_stage
    assert len({send.bytes for program in programs for send in program.boundary}) <= 1
    of_groups = [{t for t in step_traffic(p, m) if (t.axis, t.op) != ("pp", "send")} for p in programs]
    for traffic in set().union(*of_groups):
        takers = [stage for stage, its in enumerate(of_groups) if traffic in its]
        if traffic.axis == "pp":  # every member of a group across stages says the same of it
            assert len(takers) == traffic.group_size
        else:  # a group within a stage: its members share the stage's program
            make = expert_groups if traffic.axis in ("edp", "ep", "etp") else groups
            rows = stage_of(layout, make(layout, (traffic.axis,)))
            assert (rows == rows[:, :1]).all()
