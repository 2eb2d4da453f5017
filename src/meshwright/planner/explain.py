"""Why a layout loses against the best, in one line; and which layouts a person would have tried first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from meshwright.cost.estimate import Estimate, Quick
from meshwright.spec.layout import Layout

AXIS_NAMES = {"tp": "tensor-parallel", "dp": "data-parallel", "pp": "pipeline", "cp": "context-parallel"}
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


def alternatives(best: Layout, priced: Sequence[tuple[Layout, Quick]], domain: int) -> Iterator[tuple[str, Layout]]:
    """The quickest of each obvious kind (those that fit first) unless the best is of that kind itself."""
    kinds: list[tuple[str, Callable[[Layout], bool]]] = [
        ("data parallel alone", lambda x: x.tp == 1 and x.pp == 1),
        ("no tensor parallel", lambda x: x.tp == 1),
        (f"tensor parallel fills the domain (tp{domain})", lambda x: x.tp == domain > 1),
        (f"tensor parallel across domains (tp{2 * domain})", lambda x: x.tp == 2 * domain),
        ("no pipeline", lambda x: x.pp == 1),
        ("pipeline without data parallel", lambda x: x.pp > 1 and x.dp == 1),
        ("no sequence parallel", lambda x: x.tp > 1 and not x.sp),
        ("no ZeRO", lambda x: x.dp > 1 and x.zero == 0),
        ("full recompute", lambda x: x.recompute == "full"),
        ("no recompute", lambda x: x.recompute == "none"),
    ]
    seen = {best}
    for name, is_kind in kinds:
        if is_kind(best):
            continue
        members = [(layout, quick) for layout, quick in priced if is_kind(layout)]
        layout = min(members, key=lambda item: (not item[1].fits, item[1].step_time_s), default=(None,))[0]
        if layout is not None and layout not in seen:
            seen.add(layout)
            yield name, layout


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
