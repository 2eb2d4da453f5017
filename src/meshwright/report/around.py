"""What stands around a plan: ways out, the front of speed and memory, sensitivity, sizes; as terminal tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.result import Estimate
from meshwright.planner.around import Variation
from meshwright.planner.objectives import Sizing
from meshwright.planner.ways import Shortfall, WayOut
from meshwright.report.bill import duration, money
from meshwright.report.units import gib, percent, seconds


def ways_report(nearest: Estimate, ways: Sequence[WayOut]) -> RenderableType:
    short = Shortfall.of(nearest)
    head = Text(
        f"{nearest.layout} lacks {gib(short.bytes)} on stage {short.stage}; the most it holds is {short.category}, "
        f"{gib(short.category_bytes)}"
    )
    if not ways:
        return Group(head, Text("no change that was tried makes it fit"))
    rows = [
        (w.change, f"{w.layout.world:,}", str(w.layout), seconds(w.price.step_time_s), gib(w.price.peak_bytes),
         f"{w.accelerator_seconds:,.0f} s")
        for w in ways
    ]  # fmt: skip
    named = ("way out", "layout")
    return Group(head, _table("ways out, the cheapest first",
                              ("way out", "accelerators", "layout", "step", "memory", "accelerator time a step"), named, rows))  # fmt: skip


def pareto_report(front: Sequence[Estimate]) -> RenderableType:
    rows = [
        (str(e.layout), seconds(e.step_time_s), f"{e.tokens_per_s:,.0f}", percent(e.tokens_per_s / front[0].tokens_per_s - 1),
         gib(e.memory_limit_bytes - e.peak_bytes))
        for e in front
    ]  # fmt: skip
    return _table("speed against memory left free", ("layout", "step", "tokens/s", "speed", "free"), ("layout",), rows)


def sensitivity_report(variations: Sequence[Variation]) -> RenderableType:
    base = variations[0].estimate
    rows = []
    for v in variations:
        e = v.estimate
        if e is None:
            rows.append((v.change, "nothing fits", "", "", "", ""))
            continue
        each = e.tokens_per_s / v.gpus
        gain = percent(each / (base.tokens_per_s / variations[0].gpus) - 1) if base else ""
        rows.append((v.change, str(e.layout), seconds(e.step_time_s), f"{e.tokens_per_s:,.0f}", percent(e.mfu), gain))
    names = ("what changes", "best layout", "step", "tokens/s", "MFU", "tokens/s each")
    return _table("sensitivity", names, ("what changes", "best layout"), rows)


def sizing_report(sizing: Sizing) -> RenderableType:
    rows = [
        ("*" if s is sizing.chosen else "", f"{s.gpus:,}", str(s.estimate.layout), f"{s.estimate.tokens_per_s:,.0f}",
         duration(s.bill.wall_seconds), f"{s.bill.accelerator_hours:,.0f}", money(s.usd) if s.usd is not None else "no price known")
        for s in sizing.tried
    ]  # fmt: skip
    names = ("", "accelerators", "layout", "tokens/s", "time", "accelerator hours", "cost")
    chosen = f"{sizing.chosen.gpus:,} accelerators" if sizing.chosen else "no count that was tried does it"
    parts: list[RenderableType] = [
        Text(f"{sizing.asked}: {chosen}", style="bold"),
        _table("planned", names, ("", "layout"), rows),
    ]
    if sizing.idle:
        parts.append(Text("nothing fits or divides on " + ", ".join(f"{n:,}" for n in sizing.idle)))
    return Group(*parts)


def _table(title: str, names: Sequence[str], left: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    return table
