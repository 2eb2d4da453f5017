"""What a memory budget chose, in a line and as JSON."""

from __future__ import annotations

from typing import Any

from meshwright.planner.recompute import Fitted
from meshwright.report.units import gib, percent


def fitted_line(f: Fitted) -> str:
    """For a terminal."""
    budget, held = gib(f.budget), gib(f.best.peak_bytes)
    if f.best.layout == f.plain.layout:
        return f"memory budget {budget}: nothing need be recomputed, the fullest rank holds {held}"
    return (
        f"memory budget {budget}: {f.recompute} chosen, with which the fullest rank holds {held} instead of {gib(f.plain.peak_bytes)} "
        f"and a step takes {percent(f.extra)} longer"
    )


def fitted_dict(f: Fitted) -> dict[str, Any]:
    """For `--json`."""
    return {
        "budget_bytes": f.budget,
        "recompute": f.recompute,
        "peak_bytes": f.best.peak_bytes,
        "peak_bytes_without": f.plain.peak_bytes,
        "step_time_s": f.best.step_time_s,
        "step_time_s_without": f.plain.step_time_s,
    }
