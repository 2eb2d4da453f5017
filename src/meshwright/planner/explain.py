"""Why a layout loses against the best, in one line; and which layouts a person would have tried first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.cost.estimate import Estimate
from meshwright.spec.layout import Layout

AXIS_NAMES = {
    "tp": "tensor-parallel",
    "dp": "data-parallel",
    "pp": "pipeline",
    "cp": "context-parallel",
    "ep": "expert",
    "etp": "expert tensor",
    "edp": "expert data",
}
GIB = 2**30
SAME = 5e-4
"""Share of the step below which two layouts are called equally quick."""


def reason_against(estimate: Estimate, best: Estimate | None) -> str:
    """The largest thing that keeps `estimate` behind `best` (None: nothing fits)."""
    if not estimate.fits:
        worst = max(estimate.memory, key=lambda stage: stage.total_bytes)
        category = max(worst.categories, key=lambda name: worst.categories[name])
        return (
            f"does not fit: stage {worst.stage} needs {worst.total_bytes / GIB:.1f} GiB of {estimate.memory_limit_bytes / GIB:.1f}, "
            f"{worst.categories[category] / GIB:.1f} of it {category}"
        )
    loss = 1 - best.step_time_s / estimate.step_time_s if best else 0.0
    if best is None or loss < SAME:
        return "as quick as the best"
    return f"-{loss:.1%} tokens/s: {_main_difference(estimate, best)}"


@dataclass(frozen=True, slots=True)
class Kind:
    """Layouts that a person would try. `columns` reads the same fields of one layout and of all combinations of a space."""

    columns: Callable[[Any], Any] = lambda x: x.dp > 0
    leaf: Callable[[str, int], bool] = lambda schedule, zero: True
    """Of the schedule and the ZeRO stage."""

    def holds(self, layout: Layout) -> bool:
        return bool(self.columns(layout)) and self.leaf(layout.schedule, layout.zero)


def kinds_of(domain: int) -> list[tuple[str, Kind]]:
    """The obvious ones on scale-up domains of `domain` ranks, by name."""
    return [
        ("data parallel alone", Kind(lambda x: (x.tp == 1) & (x.pp == 1) & (x.cp == 1))),
        ("no tensor parallel", Kind(lambda x: x.tp == 1)),
        (f"tensor parallel fills the domain (tp{domain})", Kind(lambda x: (x.tp == domain) & (x.tp > 1))),
        (f"tensor parallel across domains (tp{2 * domain})", Kind(lambda x: x.tp == 2 * domain)),
        ("no pipeline", Kind(lambda x: x.pp == 1)),
        ("pipeline without data parallel", Kind(lambda x: (x.pp > 1) & (x.dp == 1))),
        ("plain 1F1B", Kind(lambda x: x.pp > 1, lambda schedule, zero: schedule == "1f1b")),
        ("no context parallel", Kind(lambda x: x.cp == 1)),
        ("experts whole on every rank", Kind(lambda x: (x.ep == 1) & (x.etp == 1))),
        ("experts over more than a domain", Kind(lambda x: x.ep * x.etp > domain)),
        ("no sequence parallel", Kind(lambda x: (x.tp > 1) & (x.sp == 0))),
        ("no ZeRO", Kind(lambda x: x.dp > 1, lambda schedule, zero: zero == 0)),
        ("ZeRO-3", Kind(lambda x: x.dp > 1, lambda schedule, zero: zero == 3)),
        ("full recompute", Kind(lambda x: x.recompute == "full")),
        ("no recompute", Kind(lambda x: x.recompute == "none")),
    ]


def _main_difference(estimate: Estimate, best: Estimate) -> str:
    """The part of the step that grew most."""
    parts = dict.fromkeys((*estimate.breakdown, *best.breakdown))
    grown = {part: estimate.breakdown.get(part, 0.0) - best.breakdown.get(part, 0.0) for part in parts}
    grown["bubble"] = estimate.bubble * estimate.step_time_s - best.bubble * best.step_time_s
    grown.pop("waiting", None)  # the bubble and what the stages' differences add to it
    part = max(grown, key=lambda name: grown[name])
    axis = part.split()[0]
    if part == "bubble":
        return f"pipeline bubble {_seconds(grown[part])} longer: {estimate.bubble:.0%} of the step, {best.bubble:.0%} in the best"
    if part == "optimizer":
        whole = ", its state not cut over dp" if best.layout.zero > estimate.layout.zero else ""
        return f"optimizer {_seconds(grown[part])} longer{whole}"
    if part == "compute":
        why = ", full recompute" if estimate.layout.recompute == "full" and best.layout.recompute == "none" else ""
        return f"computation {_seconds(grown[part])} longer{why}"
    slow = max((c for c in estimate.collectives if c.axis == axis), key=lambda c: c.exposed_s)
    return f"{AXIS_NAMES[axis]} communication {_seconds(grown[part])} longer ({slow.op} over {slow.group_size} ranks, {slow.link})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
