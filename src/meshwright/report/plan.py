"""The planner's answer as terminal tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.planner.search import Candidate, Plan
from meshwright.report.units import gib, percent, seconds


def plan_report(plan: Plan, title: str) -> RenderableType:
    found = (
        f"{plan.searched:,} legal layouts: {plan.priced:,} priced, of which {plan.fitting:,} fit, {plan.played:,} played, "
        f"the rest cut by a bound, in {seconds(plan.seconds)}"
    )
    if plan.best is None:
        lone = plan.candidates[0]
        return Text(f"{title}: nothing fits ({found}). Nearest: {lone.estimate.layout}, which {lone.reason}")
    parts: list[RenderableType] = [
        Text(f"{title}\n{found}", style="bold"),
        Text(),
        _table("best and runners-up", [("", c) for c in plan.candidates]),
    ]
    if plan.alternatives:
        parts += [Text(), _table("the obvious alternatives", list(plan.alternatives))]
    e = plan.best.estimate
    sources = "\n          ".join(f"{what}: {source}" for what, source in e.evidence.items())
    parts += [
        Text(),
        Text(f"rests on  {sources}", style="dim"),
        Text(),
        Text(f'next: meshwright estimate ... --layout "{e.layout}"'),
    ]
    return Group(*parts)


def _table(title: str, rows: list[tuple[str, Candidate]]) -> RenderableType:
    named = any(name for name, _ in rows)
    table = Table(title=title, title_justify="left")
    for name in (("alternative",) if named else ()) + ("layout", "step", "tokens/s", "MFU", "bubble", "memory", "why"):
        table.add_column(name, justify="right" if name in ("step", "tokens/s", "MFU", "bubble", "memory") else "left")
    for name, candidate in rows:
        e = candidate.estimate
        figures = (seconds(e.step_time_s), f"{e.tokens_per_s:,.0f}", percent(e.mfu), percent(e.bubble), gib(e.peak_bytes))
        table.add_row(*((name,) if named else ()), str(e.layout), *figures, candidate.reason)
    return table
