"""Tables of a dry run, and of what it says beside the estimate."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.report.units import gib, size
from meshwright.trace.check import Check
from meshwright.trace.result import CATEGORIES, Peak, StageTrace, Trace
from meshwright.trace.seconds import Prices

LARGEST = 8
"""Kinds of live tensors shown."""


def trace_report(trace: Trace, prices: Prices | None = None) -> RenderableType:
    room = [] if prices is None else [Text(), _room(trace.fullest, prices)]
    return Group(
        _memory(trace),
        *room,
        Text(),
        largest_table(trace.fullest.peak, f"largest live tensors at the peak of stage {trace.fullest.stage}"),
        Text(),
        _collectives(trace.fullest),
    )


def _room(stage: StageTrace, prices: Prices) -> Text:
    left = prices.head_room(stage)
    held = f"{gib(stage.peak_bytes)} live + {gib(prices.overhead_bytes)} overhead on stage {stage.stage}"
    verdict = f"{gib(left)} head-room" if left >= 0 else f"{gib(-left)} too much"
    return Text(f"{prices.cluster.accelerator.name} has {gib(prices.memory_bytes)}: {held} leave {verdict}")


def check_report(checks: tuple[Check, ...]) -> RenderableType:
    table = Table(title="where the engine, traced, differs from the estimate", title_justify="left")
    for name in ("stage", "what", "name", "unit", "traced", "estimated"):
        table.add_column(name, justify="right" if name in ("stage", "traced", "estimated") else "left")
    for check in checks:
        for line in check.differences:
            row = (line.what, line.name, line.unit, f"{line.traced:,.0f}", f"{line.estimated:,.0f}")
            table.add_row(str(check.stage), *row)
    lines = sum(len(check.lines) for check in checks)
    different = sum(len(check.differences) for check in checks)
    verdict = f"{lines - different} of {lines} lines agree: collectives, products, attention, saved tensors and state"
    peaks = [
        f"peak of stage {c.stage}: traced {gib(c.peak_bytes)}, estimated {gib(c.estimated_peak_bytes)} ({c.peak_error:+.1%})"
        for c in checks
    ]
    return Group(*([table] if different else []), Text("\n".join([verdict, *peaks])))


def check_dict(checks: tuple[Check, ...]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [
        {
            "stage": check.stage,
            "lines": len(check.lines),
            "differences": [
                {"what": d.what, "name": d.name, "unit": d.unit, "traced": d.traced, "estimated": d.estimated}
                for d in check.differences
            ],
            "peak_bytes": check.peak_bytes,
            "estimated_peak_bytes": check.estimated_peak_bytes,
        }
        for check in checks
    ]


def _memory(trace: Trace) -> Table:
    peaks = [stage.peak for stage in trace.stages]
    names = [name for name in CATEGORIES if any(name in peak.categories for peak in peaks)]
    table = Table(
        title=f"live bytes at the peak: {trace.model}, {trace.layout}, {trace.layout.world:,} ranks", title_justify="left"
    )
    for name in ("stage", *names, "total", "in"):
        table.add_column(name, justify="left" if name == "in" else "right")
    for stage, peak in zip(trace.stages, peaks, strict=True):
        held = [gib(peak.categories.get(name, 0)) for name in names]
        table.add_row(str(stage.stage), *held, gib(peak.nbytes), f"{peak.section} {peak.path}")
    return table


def largest_table(peak: Peak, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("made in", "category", "dtype", "shape", "count", "together"):
        table.add_column(name, justify="right" if name in ("count", "together") else "left")
    for storage, count in peak.largest[:LARGEST]:
        shape = " x ".join(map(str, storage.shape))
        table.add_row(storage.path, storage.category, storage.dtype, shape, str(count), gib(count * storage.nbytes))
    return table


def _collectives(stage: StageTrace) -> Table:
    table = Table(title=f"sent by rank {stage.rank} of stage {stage.stage} in the step", title_justify="left")
    for name in ("axis", "operation", "ranks", "calls", "bytes"):
        table.add_column(name, justify="left" if name in ("axis", "operation") else "right")
    for axis, op, group, calls, nbytes in stage.sent:
        table.add_row(axis, op, str(group), f"{calls:,}", size(nbytes))
    return table
