"""Tables of a dry run of somebody else's model on one device."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.report.trace import largest_table
from meshwright.report.units import gib
from meshwright.trace.result import CATEGORIES, Peak, StageTrace

MODULES = 8
"""Shown."""


def plain_report(name: str, ran: str, traced: StageTrace) -> RenderableType:
    """`ran`: what was run, in words."""
    peak = traced.peak
    table = Table(title=f"live bytes at the peak: {name}, {ran}", title_justify="left")
    for category in peak.categories:
        table.add_column(category, justify="right")
    table.add_column("total", justify="right")
    table.add_column("in")
    table.add_row(*(gib(held) for held in peak.categories.values()), gib(peak.nbytes), f"{peak.section} {peak.path}")
    return Group(
        table, Text(), largest_table(peak, "largest live tensors at the peak"), Text(), _modules(module_bytes(peak))
    )


def plain_dict(name: str, ran: str, traced: StageTrace) -> dict[str, Any]:
    """For `--json`."""
    peak = traced.peak
    return {
        "model": name,
        "run": ran,
        "peak_bytes": peak.nbytes,
        "peak_at": {"section": peak.section, "path": peak.path},
        "categories": peak.categories,
        "modules": module_bytes(peak),
        "memory": [{"section": section.name, "bytes": held} for section, held in traced.through_time()],
    }


def module_bytes(peak: Peak) -> dict[str, dict[str, int]]:
    """Modules that are alike in all layers, as `layers.*.mlp`, to category to live bytes at the peak; largest first."""
    held: dict[str, Counter[str]] = {}
    for storage, count in peak.largest:
        place = re.sub(r"\b\d+\b", "*", storage.path) or "outside of modules"
        held.setdefault(place, Counter())[storage.category] += count * storage.nbytes
    largest = sorted(held.items(), key=lambda pair: -sum(pair[1].values()))
    return {place: {name: each[name] for name in CATEGORIES if each[name]} for place, each in largest}


def _modules(held: dict[str, dict[str, int]]) -> Table:
    shown = dict(list(held.items())[:MODULES])
    names = [name for name in CATEGORIES if any(name in each for each in shown.values())]
    table = Table(title="largest modules at the peak, all layers together", title_justify="left")
    table.add_column("module")
    for name in (*names, "total"):
        table.add_column(name, justify="right")
    for place, each in shown.items():
        table.add_row(place, *(gib(each.get(name, 0)) for name in names), gib(sum(each.values())))
    return table
