"""Why a layout loses against the best, in one line; and which layouts a person would have tried first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.cost.result import Estimate
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
RATIO = 1.05
"""Of bytes, or of the time of a byte, from which on it is told."""
MATTERS = 0.01
"""Of the time of a collective: what of the best's takes less is not compared with it."""
UNEVEN = 0.02
"""How much more uneven stages must be than the best's to be given as a reason."""


def reason_against(estimate: Estimate, best: Estimate | None) -> str:
    """The largest thing that keeps `estimate` behind `best` (None: nothing fits)."""
    if not estimate.fits:
        worst = max(estimate.memory, key=lambda stage: stage.total_bytes)
        category = max(worst.categories, key=lambda name: worst.categories[name])
        if worst.total_bytes <= estimate.memory_limit_bytes and estimate.offload:
            kept, room = estimate.offload.kept_bytes / GIB, estimate.host_limit_bytes / GIB
            return f"does not fit: a rank offloads {kept:.1f} GiB, and the host has {room:.1f} for each of its ranks"
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
    leaf: Callable[[str, int, int], bool] = lambda schedule, zero, again: True
    """Of the schedule, the ZeRO stage, and what runs again: 0 nothing, 2 all layers whole, else 1."""

    def holds(self, layout: Layout) -> bool:
        full = layout.recompute == "full" and layout.recompute_layers is None
        again = 0 if layout.recompute == "none" else 2 if full else 1
        return bool(self.columns(layout)) and self.leaf(layout.schedule, layout.zero, again)


def kinds_of(domain: int) -> list[tuple[str, Kind]]:
    """The obvious ones on scale-up domains of `domain` ranks, by name."""
    return [
        ("data parallel alone", Kind(lambda x: (x.tp == 1) & (x.pp == 1) & (x.cp == 1))),
        ("no tensor parallel", Kind(lambda x: x.tp == 1)),
        (f"tensor parallel fills the domain (tp{domain})", Kind(lambda x: (x.tp == domain) & (x.tp > 1))),
        (f"tensor parallel across domains (tp{2 * domain})", Kind(lambda x: x.tp == 2 * domain)),
        ("no pipeline", Kind(lambda x: x.pp == 1)),
        ("pipeline without data parallel", Kind(lambda x: (x.pp > 1) & (x.dp == 1))),
        ("plain 1F1B", Kind(lambda x: x.pp > 1, lambda schedule, zero, again: schedule == "1f1b")),
        ("no context parallel", Kind(lambda x: x.cp == 1)),
        ("experts whole on every rank", Kind(lambda x: (x.ep == 1) & (x.etp == 1))),
        ("experts over more than a domain", Kind(lambda x: x.ep * x.etp > domain)),
        ("no sequence parallel", Kind(lambda x: (x.tp > 1) & (x.sp == 0))),
        ("no ZeRO", Kind(lambda x: x.dp > 1, lambda schedule, zero, again: zero == 0)),
        ("ZeRO-3", Kind(lambda x: x.dp > 1, lambda schedule, zero, again: zero == 3)),
        ("full recompute", Kind(lambda x: x.dp > 0, lambda schedule, zero, again: again == 2)),
        ("no recompute", Kind(lambda x: x.dp > 0, lambda schedule, zero, again: again == 0)),
    ]


def _main_difference(estimate: Estimate, best: Estimate) -> str:
    """The part of the step that grew most, and the one that shrank for it where most of the growth was given back."""
    grown = _growth(estimate, best)
    part, saved = max(grown, key=lambda name: grown[name]), min(grown, key=lambda name: grown[name])
    reason = f"{_name(part)} {_seconds(grown[part])} longer{_mechanism(part, estimate, best)}"
    if -grown[saved] > grown[part] / 2:
        reason += f"; {_name(saved)} {_seconds(-grown[saved])} shorter"
    return reason


def _growth(estimate: Estimate, best: Estimate) -> dict[str, float]:
    """Seconds that each part of the step takes more than in the best."""
    parts = dict.fromkeys((*estimate.breakdown, *best.breakdown))
    grown = {part: estimate.breakdown.get(part, 0.0) - best.breakdown.get(part, 0.0) for part in parts}
    grown["bubble"] = estimate.bubble * estimate.step_time_s - best.bubble * best.step_time_s
    grown.pop("waiting", None)  # the bubble and what the stages' differences add to it
    return grown


def _name(part: str) -> str:
    if part == "bubble":
        return "pipeline bubble"
    if part == "compute":
        return "computation"
    axis = part.split()[0]
    return f"{AXIS_NAMES[axis]} communication" if axis in AXIS_NAMES else part


def _mechanism(part: str, estimate: Estimate, best: Estimate) -> str:
    layout, other = estimate.layout, best.layout
    if part == "bubble":
        return (
            f": {estimate.bubble:.1%} of the step, {best.bubble:.1%} in the best" if estimate.bubble > best.bubble else ""
        )
    if part == "optimizer":
        return ", its state not cut over dp" if other.zero > layout.zero else ""
    if part == "compute":
        return _why_computes(estimate, best)
    axis = part.split()[0]
    return _why_sends(axis, estimate, best) if axis in AXIS_NAMES else ""


def _why_computes(estimate: Estimate, best: Estimate) -> str:
    layout, other = estimate.layout, best.layout
    if layout.recompute != other.recompute and layout.recompute != "none":
        return f", {layout.recompute} recompute"
    if layout.tp > 1 and not layout.sp and (other.sp or other.tp < layout.tp):
        return f": all {layout.tp} tensor-parallel ranks compute the whole norms and residuals"
    busiest, usual = _unevenness(estimate), _unevenness(best)
    if busiest > usual * (1 + UNEVEN):
        return f": the busiest stage works {busiest:.2f} x the mean, {usual:.2f} x in the best"
    return ""


def _unevenness(estimate: Estimate) -> float:
    """Of the busiest stage, over the mean."""
    timeline = estimate.timeline
    if timeline is None:
        return 1.0
    busy = [timeline.busy(stage) for stage in range(timeline.stages)]
    return max(busy) * len(busy) / sum(busy)


def _why_sends(axis: str, estimate: Estimate, best: Estimate) -> str:
    """The operation that most is waited for, the links it takes, and what became of it against the best's."""
    slow = max((c for c in estimate.collectives if c.axis == axis), key=lambda c: c.exposed_s)
    its = max((c for c in best.collectives if c.axis == axis and c.op == slow.op), key=lambda c: c.exposed_s, default=None)
    what = f"{slow.op} over {slow.group_size} ranks, {slow.link}"
    leaves = ": it leaves the scale-up domain" if its and (its.link, slow.link) == ("scale-up", "network") else ""
    if (
        its is None or min(its.time_s / slow.time_s, its.bytes / slow.bytes) < MATTERS
    ):  # nothing to compare with, such as the sum of a norm
        return f"{leaves} ({what})"
    more = slow.bytes / its.bytes
    dearer = slow.time_s / slow.bytes / (its.time_s / its.bytes)
    ratios = [f"{more:.1f} x the bytes of {its.group_size} ranks"] * (more > RATIO)
    ratios += [f"{dearer:.1f} x the time a byte"] * (dearer > RATIO)
    return f"{leaves} ({': '.join([what, ', '.join(ratios)]) if ratios else what})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
