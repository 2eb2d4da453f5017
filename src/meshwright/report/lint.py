"""What the rules found, as a terminal table; and the rules themselves."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.planner.lint import RULES, Linted
from meshwright.planner.rules.case import Finding
from meshwright.planner.rules.shapes import REFUSALS, SOURCE
from meshwright.report.units import gib, percent, seconds

WIDTHS = {"severity": 4, "rule": 9, "what": 16, "price": 11, "repair": 12, "source": 13}
"""Of the columns, against one another."""


def lint_report(linted: Linted, title: str) -> RenderableType:
    price = linted.price
    as_given = f"{seconds(price.step_time_s)} a step, {gib(price.peak_bytes)}" if price else "cannot run"
    head = Text(f"{title}\n{linted.layout}: {as_given}", style="bold")
    if not linted.findings:
        return Group(head, Text("no rule has anything to say"))
    table = Table(expand=True)
    for name in WIDTHS:
        table.add_column(name, overflow="fold", ratio=WIDTHS[name])
    for finding in linted.findings:
        repair = finding.repair.change if finding.repair else "none found"
        table.add_row(finding.severity, finding.rule, finding.what, price_of(finding), repair, finding.source)
    counts = {s: sum(f.severity == s for f in linted.findings) for s in ("error", "warning", "note")}
    return Group(head, table, Text(", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items() if n)))


def price_of(finding: Finding) -> str:
    """What the bad state costs beside the repair."""
    repair, given, loss = finding.repair, finding.given, finding.loss
    if repair is None:
        return "no repair to compare with"
    after = repair.price
    if given is None:
        return f"repaired {seconds(after.step_time_s)} a step, {gib(after.peak_bytes)}"
    if after is given or after == given:
        return f"{percent(loss)} of the wall clock" if loss else "nothing in time"
    memory = f"{gib(given.peak_bytes)} to {gib(after.peak_bytes)}"
    step = f"{seconds(given.step_time_s)} to {seconds(after.step_time_s)}"
    return f"{given.step_time_s / after.step_time_s:.2f}x the step: {step}; {memory}"


def rules_report() -> RenderableType:
    table = Table(title="the rules of lint", title_justify="left")
    for name in ("rule", "looks for", "source"):
        table.add_column(name, overflow="fold")
    for name, looks_for in REFUSALS:
        table.add_row(name, looks_for, SOURCE)
    for rule in RULES:
        table.add_row(rule.name, rule.looks_for, rule.source)
    return table
