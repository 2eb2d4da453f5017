"""Stages of equal depth beside stages of equal cost."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.planner.stages import Balanced
from meshwright.report.units import gib, percent, seconds


def balanced_report(b: Balanced) -> RenderableType:
    table = Table(title=f"{b.best.model} on {b.best.layout.world} x {b.best.cluster}", title_justify="left")
    for name in ("stages", "layout", "step", "bubble", "memory"):
        table.add_column(name, justify="left" if name in ("stages", "layout") else "right")
    rows = [("equal depth", b.even)] + ([("equal cost", b.best)] if b.best is not b.even else [])
    for name, e in rows:
        memory = gib(e.peak_bytes) + ("" if e.fits else ": does not fit")
        table.add_row(name, str(e.layout), seconds(e.step_time_s), percent(e.bubble), memory)
    slowest = max(b.chunk_seconds)
    chunks = ", ".join(f"{each / slowest:.2f}" for each in b.chunk_seconds)
    verdict = f"{percent(b.speedup - 1)} more tokens/s" if b.best is not b.even else "stages of equal depth are as good"
    return Group(table, Text(f"{verdict}; cost of each chunk against the slowest: {chunks}"))


def balanced_dict(b: Balanced) -> dict[str, Any]:
    """For `--json`."""
    return {
        "layout": str(b.best.layout),
        "speedup": b.speedup,
        "chunk_seconds": list(b.chunk_seconds),
        "even": b.even.as_dict(),
        "best": b.best.as_dict(),
    }
