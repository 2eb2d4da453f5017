"""What the search leaves out, tried on its finalists: stages of equal cost, async tensor parallel, pairs; each with the recompute, offload
and rank order that then fit best.

Each of these changes little, and only from a layout that is good already: hill climbing with the exact estimator, one change at a
time, until none makes the layout quicker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Price
from meshwright.planner.explain import reason_against
from meshwright.planner.rules.reshape import order_has_price
from meshwright.planner.search import Candidate, Plan
from meshwright.planner.stages import least_maximum_layers
from meshwright.spec.errors import UserError
from meshwright.spec.layout import PAIRING, Layout, RecomputePart

GAIN = 1e-3
"""Share of the step that a change must save."""
PARTS: tuple[tuple[RecomputePart, ...], ...] = (("norms",), ("activation",), ("norms", "activation"), ("core",))
"""What may run again instead of whole layers: the first three add next to nothing to the step."""


def refined(plan: Plan, estimator: Estimator) -> Plan:
    """`plan` with its best and its runners-up refined; as it was where nothing fits or nothing pays."""
    if plan.best is None:
        return plan
    found = refine(estimator, [c.estimate.layout for c in plan.candidates])
    priced = [estimator.estimate(layout) for layout, _ in found]
    gain = 1 - priced[0].step_time_s / plan.best.estimate.step_time_s
    best = (
        Candidate(priced[0], f"the quickest layout that fits, {gain:.1%} quicker than before refinement")
        if gain > 0
        else plan.best
    )
    others = [Candidate(e, reason_against(e, best.estimate)) for e in priced if e.layout != best.estimate.layout]
    again = tuple((name, Candidate(c.estimate, reason_against(c.estimate, best.estimate))) for name, c in plan.alternatives)
    return replace(plan, best=best, candidates=(best, *others), alternatives=again)


def refine(estimator: Estimator, finalists: Sequence[Layout]) -> list[tuple[Layout, Price]]:
    """Each finalist after all changes that make it quicker, the quickest first; layouts that do not fit are left out."""
    found: dict[Layout, Price] = {}
    for layout in finalists:
        price = price_of(estimator, layout)
        if price is not None and price.fits:
            best, its = climb(estimator, layout, price)
            found[best] = its
    return sorted(found.items(), key=lambda row: (row[1].step_time_s, str(row[0])))


def climb(estimator: Estimator, layout: Layout, price: Price) -> tuple[Layout, Price]:
    """`layout` changed for as long as that pays."""
    while True:
        tried = [(x, found) for x in neighbours(estimator, layout) if (found := price_of(estimator, x)) is not None]
        quicker = [(x, p) for x, p in tried if p.fits and p.step_time_s < price.step_time_s * (1 - GAIN)]
        if not quicker:
            return layout, price
        layout, price = min(quicker, key=lambda row: (row[1].step_time_s, str(row[0])))


def neighbours(estimator: Estimator, layout: Layout) -> Iterator[Layout]:
    """Layouts one change away, some of which may not run."""
    yield from _recomputes(estimator, layout)
    if layout.offload == "none":
        away = replace(layout, offload="optimizer")
        yield away
        if layout.recompute != "none":
            yield from _recomputes(estimator, away)
    yield from _orders(layout, estimator.cluster.fabric.domain)
    if layout.pp > 1 and layout.stage_layers is None:
        yield from _balanced(estimator, layout)
    if layout.sp and not layout.async_tp:
        yield replace(layout, async_tp=True)
    if layout.pp > 1 and layout.ep > 1 and not layout.async_ep:
        yield from _paired(layout)


def _recomputes(estimator: Estimator, layout: Layout) -> Iterator[Layout]:
    """Nothing recomputed or, where that does not fit, the fewest layers of each chunk that do: the step grows with every layer."""
    plain = replace(layout, recompute="none", recompute_parts=("core",), recompute_layers=None)
    if (price := price_of(estimator, plain)) is None:
        return
    if price.fits:
        yield plain
        return
    held = -(-estimator.model.layers // (layout.pp * layout.chunks))
    modes = [replace(plain, recompute="selective", recompute_parts=parts) for parts in PARTS]
    for mode in (replace(plain, recompute="full"), *modes):
        some = [replace(mode, recompute_layers=n) for n in range(1, held)] + [mode]
        least = bisect_left(some, True, key=lambda x: (p := price_of(estimator, x)) is not None and p.fits)
        yield from some[least : least + 1]


def _orders(layout: Layout, domain: int) -> Iterator[Layout]:
    """Those that differ in which ranks talk: axes of degree 1 stay last."""
    split = [axis for axis in layout.order if layout.degree(axis) > 1]
    whole = [axis for axis in layout.order if layout.degree(axis) == 1]
    for order in permutations(split):
        found = replace(layout, order=(*order, *whole))
        if list(order) != split and order_has_price(found, domain):
            yield found


def _balanced(estimator: Estimator, layout: Layout) -> Iterator[Layout]:
    try:
        yield replace(layout, stage_layers=least_maximum_layers(estimator, layout))
    except UserError:
        return


def _paired(layout: Layout) -> Iterator[Layout]:
    """Under a schedule of pairs, with the way to experts under the other pass."""
    kept = layout.stage_layers if layout.schedule in PAIRING else None
    for schedule in PAIRING:
        try:
            yield replace(layout, schedule=schedule, chunks=2, async_ep=True, stage_layers=kept)
        except UserError:
            return


def price_of(estimator: Estimator, layout: Layout) -> Price | None:
    """None for a layout that cannot run."""
    try:
        estimator.check(layout)
        return estimator.played(layout)
    except UserError:
        return None
