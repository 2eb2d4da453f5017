"""The recompute that fits a memory budget at the least cost in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate, Price
from meshwright.schedule.stages import stage_chunks
from meshwright.spec.errors import UserError
from meshwright.spec.layout import RECOMPUTE_PARTS, Layout
from meshwright.spec.legality import check_layout

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Fitted:
    """A layout with the recompute chosen for it, beside the same layout without any."""

    budget: int
    """Bytes of a rank, all that it holds: state, activations, temporaries, and what the runtime takes."""
    plain: Estimate
    best: Estimate

    @property
    def extra(self) -> float:
        """What the recompute adds to the step, as a share of the step without."""
        return self.best.step_time_s / self.plain.step_time_s - 1

    @property
    def recompute(self) -> str:
        """What was chosen, as a layout says it."""
        return recompute_token(self.best.layout)


def fit_recompute(estimator: Estimator, layout: Layout, budget: int) -> Fitted:
    """Choose the parts that `layout` recomputes, and in how many layers of each chunk, so that the fullest rank stays within `budget`
    bytes and the step is as short as can be; of equal steps, the one that holds less.

    Exact: every legal list of parts and full recompute are tried. With more layers that run again a step is never shorter, and holds
    no more: so of each mode only the fewest layers that fit can be the best, and bisection finds them. A larger budget only adds to
    what is chosen from, so it never makes the step longer.

    Raises UserError for a layout that cannot run, that says itself what it recomputes, or that no recompute makes fit.
    """
    if budget < 1:
        raise UserError(f"memory budget must be at least 1 byte, got {budget}")
    if layout.recompute != "none":
        raise UserError(
            f"a memory budget chooses what is recomputed: leave {recompute_token(layout)} out of the layout, or leave out the budget"
        )
    estimator.check(layout)
    priced = {layout: estimator.played(layout)}
    if priced[layout].peak_bytes > budget:
        for mode in _modes(estimator, layout):
            priced |= _fewest_layers(estimator, mode, budget)
    fitting = [one for one, price in priced.items() if price.peak_bytes <= budget]
    if not fitting:
        raise _nothing_fits(priced, budget)
    best = min(fitting, key=lambda one: (priced[one].step_time_s, priced[one].peak_bytes))
    return Fitted(budget, estimator.estimate(layout), estimator.estimate(best))


def _modes(estimator: Estimator, layout: Layout) -> Iterator[Layout]:
    """`layout` with full recompute, and with every list of parts that is legal for it, in all layers."""
    yield replace(layout, recompute="full")
    for count in range(1, len(RECOMPUTE_PARTS) + 1):
        for parts in combinations(RECOMPUTE_PARTS, count):
            try:
                mode = replace(layout, recompute="selective", recompute_parts=parts)
                check_layout(mode, estimator.model, estimator.workload)
            except UserError:
                continue
            yield mode


def _fewest_layers(estimator: Estimator, mode: Layout, budget: int) -> dict[Layout, Price]:
    """The mode in all layers, and in the fewest of each chunk that fit."""
    all_ = estimator.played(mode)
    if all_.peak_bytes > budget:
        return {mode: all_}
    found = {mode: all_}
    low, high = 1, max(len(chunk.layers) for chunks in stage_chunks(estimator.model.layers, mode) for chunk in chunks)
    while low < high:
        middle = (low + high) // 2
        some = replace(mode, recompute_layers=middle)
        price = estimator.played(some)
        if price.peak_bytes <= budget:
            found, high = {some: price}, middle
        else:
            low = middle + 1
    return found


def _nothing_fits(priced: dict[Layout, Price], budget: int) -> UserError:
    least = min(priced, key=lambda one: priced[one].peak_bytes)
    peak = priced[least].peak_bytes
    return UserError(
        f"no recompute fits {budget / GIB:.1f} GiB: {least} still needs {peak / GIB:.1f} GiB on the fullest rank, "
        f"{(peak - budget) / GIB:.1f} GiB too much: try a higher ZeRO stage, tp or pp, a smaller micro-batch, or `meshwright plan`"
    )


def recompute_token(layout: Layout) -> str:
    """As the layout's notation says it; "ac:none" where it is left out."""
    return next((token for token in str(layout).split() if token.startswith("ac:")), "ac:none")
