"""When a layout does not fit: by how much, because of what, and the cheapest ways out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate, Price
from meshwright.planner.refine import price_of
from meshwright.planner.rules.reshape import eased, reshaped
from meshwright.spec.layout import Layout

TIMES = (2, 3, 4, 6, 8, 12, 16)
"""As many accelerators are tried."""
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What the fullest stage lacks, in bytes, and what it holds most of."""

    stage: int
    bytes: int
    category: str
    category_bytes: int

    @classmethod
    def of(cls, e: Estimate) -> Shortfall:
        worst = max(e.memory, key=lambda stage: stage.total_bytes)
        category = max(worst.categories, key=lambda name: worst.categories[name])
        return cls(worst.stage, worst.total_bytes - e.memory_limit_bytes, category, worst.categories[category])


@dataclass(frozen=True, slots=True)
class WayOut:
    """A layout that fits, and the change that leads to it."""

    change: str
    layout: Layout
    price: Price

    @property
    def accelerator_seconds(self) -> float:
        """Of a step: what it costs, whatever an hour does."""
        return self.layout.world * self.price.step_time_s

    def as_dict(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "layout": str(self.layout),
            "world": self.layout.world,
            "step_time_s": self.price.step_time_s,
            "peak_bytes": self.price.peak_bytes,
            "accelerator_seconds": self.accelerator_seconds,
        }


def ways_out(estimator: Estimator, layout: Layout) -> list[WayOut]:
    """The three cheapest kinds of change after which `layout` fits, the cheapest first. Where fewer than three are enough alone, also
    two changes at once, unless one of the two alone is as cheap. One of the three keeps the accelerators, where any way does."""
    found = _best_of_each(estimator, {name: list(change(layout)) for name, change in CHANGES.items()})
    if len(found) < SHOWN:
        alone = {way.change: way.accelerator_seconds for way in found}
        pairs = {(a, b): [y for x in CHANGES[a](layout) for y in CHANGES[b](x)] for a, b in combinations(CHANGES, 2)}
        both = _best_of_each(estimator, {f"{a} and {b}": layouts for (a, b), layouts in pairs.items()})
        least = {f"{a} and {b}": min(alone.get(name, float("inf")) for name in (a, b)) for a, b in pairs}
        found += [way for way in both if way.accelerator_seconds < least[way.change]]
    found.sort(key=lambda way: way.accelerator_seconds)
    shown, kept = found[:SHOWN], [way for way in found if way.layout.world == layout.world]
    if kept and kept[0] not in shown:
        shown[-1] = kept[0]
    return shown


def _best_of_each(estimator: Estimator, kinds: dict[str, list[Layout]]) -> list[WayOut]:
    out = []
    for name, layouts in kinds.items():
        priced = [
            (x, price) for x in dict.fromkeys(layouts) if (price := price_of(estimator, x)) is not None and price.fits
        ]
        if priced:
            best, price = min(priced, key=lambda row: (row[0].world * row[1].step_time_s, str(row[0])))
            out.append(WayOut(name, best, price))
    return out


def _more_ranks(layout: Layout) -> Iterator[Layout]:
    for times in TIMES:
        for axis in ("dp", "tp", "pp", "cp"):
            more = reshaped(layout, **{axis: layout.degree(axis) * times})
            if more is not None:
                yield from eased([more])


def _split_further(layout: Layout) -> Iterator[Layout]:
    for times in TIMES:
        for axis in ("tp", "pp", "cp"):
            if layout.dp % times == 0:
                more = reshaped(layout, **{axis: layout.degree(axis) * times}, dp=layout.dp // times)
                if more is not None:
                    yield more


def _recompute(layout: Layout) -> Iterator[Layout]:
    for mode in ("selective", "full"):
        found = reshaped(layout, recompute=mode, recompute_parts=("core",), recompute_layers=None)
        if found is not None and found.recompute == mode:
            yield found


def _zero(layout: Layout) -> Iterator[Layout]:
    for stage in range(layout.zero + 1, 4):
        found = reshaped(layout, zero=stage, zero_shard=None)
        if found is not None and found.zero == stage:
            yield found


def _offload(layout: Layout) -> Iterator[Layout]:
    if layout.offload == "none":
        yield replace(layout, offload="optimizer")
    if layout.zero == 3 and layout.offload != "all":
        yield replace(layout, offload="all")


def _smaller_micro_batch(layout: Layout) -> Iterator[Layout]:
    size = layout.micro_batch // 2
    while size >= 1:
        yield replace(layout, micro_batch=size)
        size //= 2


def _narrow_gradients(layout: Layout) -> Iterator[Layout]:
    if layout.precision in ("bf16", "fp16") and layout.gradient_dtype is None:
        yield replace(layout, gradient_dtype=layout.precision)


CHANGES: dict[str, Callable[[Layout], Iterator[Layout]]] = {
    "more accelerators": _more_ranks,
    "the same accelerators split further": _split_further,
    "recompute": _recompute,
    "ZeRO": _zero,
    "offload": _offload,
    "smaller micro-batch": _smaller_micro_batch,
    "gradients in 16 bits": _narrow_gradients,
}
"""A person's ways to make room, each as the layouts that it leads to."""
