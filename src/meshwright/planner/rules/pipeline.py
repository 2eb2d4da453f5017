"""Pipelines that wait, and splits that nothing asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.planner.rules.case import Case, Rule, Seen
from meshwright.planner.rules.reshape import cuts, eased, reshaped
from meshwright.planner.space import MAX_CHUNKS, divisors
from meshwright.planner.stages import balance_stages
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches

ENOUGH = 4
"""Micro-batches a stage at which the GPipe paper calls the bubble negligible (arXiv 1811.06965, section 2.3)."""
MOST_LESS = 8


def few_micro_batches(case: Case) -> Seen | None:
    layout = case.layout
    m = micro_batches(layout, case.workload)
    if layout.pp == 1 or m >= ENOUGH * layout.pp:
        return None
    bubble, shorter = case.estimate.bubble, list(cuts(layout, "pp", layout.pp // 2))
    return Seen(
        f"{m} micro-batches for {layout.pp} stages, fewer than {ENOUGH} a stage: {bubble:.0%} of the pipeline's time is bubble",
        case.quickest((*_other_schedules(layout), *shorter, *_smaller(layout)), eased(shorter)),
    )


def pipeline_alone(case: Case) -> Seen | None:
    layout = case.layout
    if layout.pp == 1 or layout.dp > 1:
        return None
    m = micro_batches(layout, case.workload)
    replicas = [x for axis in ("pp", "tp", "cp") for x in cuts(layout, axis, layout.degree(axis) // 2, ("dp",))]
    return Seen(
        f"one pipeline of {layout.world} ranks takes the whole batch: {m} micro-batches a step, whatever the ranks",
        case.quickest(replicas, eased(replicas)),
    )


def needless_split(case: Case) -> Seen | None:
    layout = case.layout
    if layout.tp * layout.pp * layout.cp * layout.etp == 1:
        return None
    plain: dict[str, object] = {"dp": layout.world, "tp": 1, "pp": 1, "cp": 1, "etp": 1}
    state = [{"zero": zero, "zero_shard": None, "micro_batch": mb} | plain for zero in (0, 1) for mb in (1, 2, 4, 8)]
    repair = case.quickest(found for changes in state if (found := reshaped(layout, **changes)))
    if repair is None or repair.price.step_time_s >= case.given.step_time_s:
        return None
    gib = repair.price.peak_bytes / 2**30
    return Seen(
        f"{case.model.name} and its state fit every rank whole ({gib:.1f} GiB): the split only adds communication", repair
    )


def uneven_layers(case: Case) -> Seen | None:
    layout, layers = case.layout, case.model.layers
    chunks = layout.pp * layout.chunks
    if layout.pp == 1 or layers % chunks == 0 or layout.stage_layers is not None:
        return None
    fitting = [x for pp in divisors(layers) if pp <= 2 * layout.pp for x in _with_pp(layout, pp)]
    found = [case.quickest(fitting)]
    try:
        best = balance_stages(case.estimator(), layout).best
    except UserError:
        pass
    else:
        found.append(case.quickest([best.layout]))
    repairs = [r for r in found if r is not None]
    return Seen(
        f"{layers} layers over {chunks} chunks: some hold {-(-layers // chunks)}, some {layers // chunks}, and all wait for the largest",
        min(repairs, key=lambda r: (not r.price.fits, r.price.step_time_s), default=None),
    )


def _with_pp(layout: Layout, pp: int) -> Iterator[Layout]:
    if layout.pp * layout.dp % pp == 0:
        found = reshaped(layout, pp=pp, dp=layout.pp * layout.dp // pp)
        if found is not None:
            yield found


def _other_schedules(layout: Layout) -> Iterator[Layout]:
    kept = replace(layout, stage_layers=None)
    for schedule, chunks in (("zb-h1", 1), ("zb-v", 2), *(("interleaved", v) for v in range(2, MAX_CHUNKS + 1))):
        found = reshaped(kept, schedule=schedule, chunks=chunks)
        if found is not None:
            yield found


def _smaller(layout: Layout) -> Iterator[Layout]:
    """With smaller micro-batches, of which there are more."""
    for mb in divisors(layout.micro_batch)[:-1][-MOST_LESS:]:
        yield replace(layout, micro_batch=mb)


RULES = (
    Rule(
        "pipeline without enough micro-batches",
        f"fewer than {ENOUGH} micro-batches a stage",
        "Huang et al. 2019 (GPipe), arXiv 1811.06965, section 2.3: bubble (K-1)/(M+K-1), negligible from M = 4 K",
        few_micro_batches,
    ),
    Rule(
        "pipeline without data parallel",
        "one pipeline for the whole batch",
        "Narayanan et al. 2021, arXiv 2104.04473, section 3.3.1: bubble (p-1)/m falls with more data parallel for the same ranks",
        pipeline_alone,
    ),
    Rule(
        "model too small to split",
        "tensor, pipeline or context parallel where data parallel alone fits and is quicker",
        "Hugging Face, The Ultra-Scale Playbook, step 1: for a small model one way of splitting is enough",
        needless_split,
    ),
    Rule(
        "layers not divisible",
        "pipeline chunks of unequal depth",
        "Narayanan et al. 2021, arXiv 2104.04473, section 2.2: as many layers for every stage",
        uneven_layers,
    ),
)
