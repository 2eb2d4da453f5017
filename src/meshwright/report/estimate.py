"""One priced layout as terminal tables."""

from __future__ import annotations

from math import isfinite

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.result import Estimate
from meshwright.report.units import count, gib, percent, seconds, size
from meshwright.spec.residuals import SHARE

MANY_STAGES = 8


def estimate_report(e: Estimate) -> RenderableType:
    return Group(_headline(e), Text(), _memory(e), Text(), _collectives(e), Text(), _evidence(e))


def _headline(e: Estimate) -> RenderableType:
    table = Table(
        title=f"{e.model} on {e.layout.world} x {e.cluster}: {e.layout}", title_justify="left", show_header=False, box=None
    )
    table.add_column(style="bold")
    table.add_column()
    verdict = "fits" if e.fits else "[red]does not fit[/red]"
    rows = [
        ("step", f"{seconds(e.step_time_s)} for {e.workload.global_batch} sequences of {e.workload.seq} tokens"),
        ("error bar", _bar(e)),
        *_uneven(e),
        (
            "throughput",
            f"{e.tokens_per_s:,.0f} tokens/s, {e.tokens_per_s / e.layout.world:,.0f} a GPU, {count(e.tokens_per_s * 86_400)} tokens a day",
        ),
        ("MFU / HFU", f"{percent(e.mfu)} / {percent(e.hfu)}"),
        ("pipeline bubble", percent(e.bubble)),
        ("memory", f"{gib(e.peak_bytes)} of {gib(e.memory_limit_bytes)} on the fullest stage: {verdict}"),
        ("step by part", ", ".join(f"{name} {seconds(value)}" for name, value in e.breakdown.items() if value > 0)),
    ]
    if (away := e.offload) is not None:
        moved = f"{size(away.read_bytes)} read and {size(away.written_bytes)} written a step"
        times = f"{seconds(away.time_s)}, of which {seconds(away.exposed_s)} exposed"
        room = f", of {gib(e.host_limit_bytes)} that the host has for it" if isfinite(e.host_limit_bytes) else ""
        kept = f"{gib(away.kept_bytes)} of the rank that keeps most{room}"
        rows.insert(-1, (f"offload to {away.where}", f"{kept}; {moved}: {times}"))
    for row in rows:
        table.add_row(*row)
    return table


def _uneven(e: Estimate) -> list[tuple[str, str]]:
    if (given := e.workload.expert_imbalance) == 1.0:
        return []
    return [("experts", f"of the rank whose fullest expert gets {given:g} times the mean")]


def _bar(e: Estimate) -> str:
    if e.error_bar is None:
        return "none: no published runs of this class were scored"
    low, high = e.error_bar.around(e.step_time_s)
    bar = e.error_bar
    runs = f"{bar.runs:,} published runs of this class, from {bar.sources} source{'s'[: bar.sources - 1]}"
    others = ", and of those of other classes, since these are few" if bar.widened else ""
    return f"{seconds(low)} to {seconds(high)}: so far off were {SHARE:.0%} of {runs}{others}"


def _memory(e: Estimate) -> RenderableType:
    names = list(e.memory[0].categories)
    table = Table(title="memory of a rank by stage", title_justify="left")
    for name in ("stage", *names, "total"):
        table.add_column(name, justify="right")
    shown = (
        e.memory
        if len(e.memory) <= MANY_STAGES
        else (*e.memory[:3], max(e.memory, key=lambda s: s.total_bytes), *e.memory[-2:])
    )
    for stage in dict.fromkeys(s.stage for s in sorted(shown, key=lambda s: s.stage)):
        held = e.memory[stage]
        table.add_row(str(stage), *(gib(held.categories[name]) for name in names), gib(held.total_bytes))
    return table


def _collectives(e: Estimate) -> RenderableType:
    table = Table(title="communication of a rank in a step (the stage that sends most)", title_justify="left")
    for name in ("axis", "operation", "ranks", "link", "calls", "bytes", "time", "exposed"):
        table.add_column(name, justify="left" if name in ("axis", "operation", "link") else "right")
    for c in e.collectives:
        table.add_row(
            c.axis, c.op, str(c.group_size), c.link, str(c.count), size(c.bytes), seconds(c.time_s), seconds(c.exposed_s)
        )
    return table


def _evidence(e: Estimate) -> RenderableType:
    return Text("rests on  " + "\n          ".join(f"{what}: {source}" for what, source in e.evidence.items()), style="dim")
