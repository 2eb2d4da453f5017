"""What is kept, what is made again, and what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from meshwright.cost.economics import Bill
from meshwright.planner.bill import training_bill
from meshwright.planner.rules.case import WORTH, Case, Repair, Rule, Seen
from meshwright.planner.rules.reshape import eased, reshaped
from meshwright.planner.space import divisors
from meshwright.planner.ways import Shortfall
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches

FLAT = 2.0
"""An interval within this factor of the best loses at most a quarter more of the little that is lost there (docs/economics.md)."""


def gathered_again(case: Case) -> Seen | None:
    layout = case.layout
    m = micro_batches(layout, case.workload)
    if layout.zero < 2 or layout.pp == 1 or m == 1:
        return None
    kept = [replace(layout, zero=zero, offload="none") for zero in ((1, 2) if layout.zero == 3 else (1,))]
    split = [x for f in (2, 4) for one in kept for axis in ("tp", "pp") for x in _more(one, axis, f)]
    does = "gathers parameters twice and reduces gradients once" if layout.zero == 3 else "reduces gradients once"
    return Seen(
        f"zero{layout.zero} {does} for each of {m} micro-batches of a pipeline that must hold all of its layers anyway",
        case.quickest(kept, eased(kept), eased(split)),
    )


def _more(layout: Layout, axis: str, factor: int) -> Iterator[Layout]:
    if layout.dp % factor == 0:
        found = reshaped(layout, **{axis: layout.degree(axis) * factor}, dp=layout.dp // factor)
        if found is not None:
            yield found


def needless_recompute(case: Case) -> Seen | None:
    layout = case.layout
    if layout.recompute == "none":
        return None
    repair = case.quickest(less_recompute(layout, case.model.layers))
    if repair is None or not repair.price.fits or repair.price.step_time_s >= case.given.step_time_s:
        return None
    spare = (case.cluster.accelerator.memory_bytes - case.given.peak_bytes) / 2**30
    return Seen(f"{spare:.1f} GiB of each rank stay free while activations are computed twice", repair)


def less_recompute(layout: Layout, layers: int) -> Iterator[Layout]:
    """The same layout with less run again: nothing, the attention core alone, or fewer layers of each chunk."""
    for mode in ("none", "selective"):
        if mode != layout.recompute:
            found = reshaped(layout, recompute=mode, recompute_parts=("core",), recompute_layers=None)
            if found is not None:
                yield found
    held = -(-layers // (layout.pp * layout.chunks))
    for some in range(1, min(held, layout.recompute_layers or held)):
        yield replace(layout, recompute_layers=some)


def far_interval(case: Case) -> Seen | None:
    terms = case.habits.terms
    if terms.interval_seconds is None:
        return None
    best = _bill(case, best=True)
    optimum = best.reliability.best_interval
    try:
        given = _bill(case, best=False)
    except UserError as error:
        return Seen(str(error), Repair(f"--checkpoint-interval {optimum:.0f}s", case.given), "error", 1.0)
    ratio = terms.interval_seconds / optimum
    if 1 / FLAT <= ratio <= FLAT:
        return None
    loss = 1 - given.reliability.effective_ratio / best.reliability.effective_ratio
    return Seen(
        f"a checkpoint every {terms.interval_seconds:,.0f} s, {ratio:,.3g} times the best {optimum:,.0f} s at one failure every "
        f"{given.reliability.between_failures:,.0f} s: {given.reliability.effective_ratio:.1%} of the wall clock trains, not "
        f"{best.reliability.effective_ratio:.1%}",
        Repair(f"--checkpoint-interval {optimum:.0f}s", case.given),
        "warning" if loss >= WORTH else "note",
        loss,
    )


def _bill(case: Case, *, best: bool) -> Bill:
    terms = replace(case.habits.terms, interval_seconds=None) if best else case.habits.terms
    return training_bill(case.estimate, case.model, case.cluster, case.workload.tokens, terms)


def does_not_fit(case: Case) -> Seen | None:
    if case.given.fits:
        return None
    short = Shortfall.of(case.estimate)
    return Seen(
        f"stage {short.stage} lacks {short.bytes / 2**30:.1f} GiB; most of what it holds is {short.category}, "
        f"{short.category_bytes / 2**30:.1f} GiB",
        case.quickest(_roomier([case.layout]), _roomier(_spread(case.layout))),
        severity="error",
    )


def _roomier(layouts: Iterable[Layout]) -> Iterator[Layout]:
    for one in eased(layouts):
        yield one
        for zero in (2, 3):
            found = reshaped(one, zero=zero)
            if found is not None:
                yield found


def _spread(layout: Layout) -> Iterator[Layout]:
    """With fewer data-parallel ranks, and more of another axis."""
    for axis in ("tp", "pp", "cp"):
        for factor in divisors(layout.dp)[1:4]:
            yield from _more(layout, axis, factor)


RULES = (
    Rule(
        "does not fit",
        "a layout that needs more memory than an accelerator has",
        "the estimate's own sum over stages and categories (docs/cost-model.md)",
        does_not_fit,
    ),
    Rule(
        "ZeRO-3 under a pipeline",
        "parameters gathered, or gradients scattered (ZeRO-2), for every micro-batch of a pipeline",
        "DeepSpeed, runtime/pipe/engine.py, refuses ZeRO-2 and 3; Llama 3, arXiv 2407.21783, section 3.3.2: parameters are not resharded",
        gathered_again,
    ),
    Rule(
        "recompute that memory does not need",
        "activations run again though a quicker layout without, or with fewer layers of it, fits",
        "Korthikanti et al. 2022, arXiv 2205.05198, section 1: full recompute takes 30 to 40 % longer",
        needless_recompute,
    ),
    Rule(
        "checkpoint interval far from the best",
        f"a given interval (--checkpoint-interval) over {FLAT:g} times longer or shorter than the best",
        "Young 1974; Daly 2006; Kokolis et al. 2024, arXiv 2410.21680",
        far_interval,
    ),
)
