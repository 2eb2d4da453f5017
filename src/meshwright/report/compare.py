"""Planned against measured, of the same layout: step time, state bytes, bytes on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from meshwright.cost.estimate import Estimator
from meshwright.cost.memory import away_bytes, state_bytes
from meshwright.cost.program import Place, Program, rank_program
from meshwright.cost.traffic import step_traffic
from meshwright.report.units import seconds, size
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.legality import micro_batches
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one layout, in `unit` seconds or bytes."""

    layout: str
    figure: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus one; exactly zero where both are equal, both zero included."""
        if self.predicted == self.measured:
            return 0.0
        return self.predicted / self.measured - 1 if self.measured else float("inf")

    def as_dict(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "figure": self.figure,
            "unit": self.unit,
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
        }


def compare_run(directory: str, cluster: str) -> list[Row]:
    """The rows of one finished run: step time, then state and traffic of the rank that holds or sends most.

    Raises UserError when the directory holds no report of a run.
    """
    path = Path(directory) / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not the report of a run ({error}); finish `meshwright train --out {directory}` first"
        ) from error
    recipe, layout = report["recipe"], parse_layout(report["layout"])
    model, workload = load_model(recipe["model"]), Workload(recipe["seq"], recipe["global_batch"])
    priced = Estimator(model, load_cluster(cluster), workload).estimate(layout)
    name = str(layout)
    rows = [
        Row(name, f"step time (median of {report['steps_timed']})", "s", priced.step_time_s, report["median_step_time_s"])
    ]
    programs = {
        (r["stage"], r["tp"]): rank_program(model, layout, workload, Place(r["stage"], r["tp"])) for r in report["ranks"]
    }
    held = [state_bytes(p, layout) for p in programs.values()]
    for kind in held[0]:
        measured = max(r["state_bytes"][kind] for r in report["ranks"])
        rows.append(Row(name, f"{kind}, largest rank", "B", max(h[kind] for h in held), measured))
    for where in away_bytes(next(iter(programs.values())), layout):
        predicted = max(away_bytes(p, layout)[where] for p in programs.values())
        rows.append(Row(name, f"{where}, largest rank", "B", predicted, max(r["away_bytes"] for r in report["ranks"])))
    rows += _traffic_rows(name, report["ranks"], programs, micro_batches(layout, workload))
    return rows


def _traffic_rows(
    name: str, ranks: list[dict[str, Any]], programs: dict[tuple[int, int], Program], m: int
) -> Iterator[Row]:
    """Bytes a step of the rank that sends most, axis by axis."""
    predicted = [_by_axis((s.axis, s.bytes) for s in step_traffic(p, m)) for p in programs.values()]
    measured = [_by_axis((c["axis"], c["bytes"]) for c in r["collectives"]) for r in ranks]
    for axis in sorted({axis for sent in (*predicted, *measured) for axis in sent}):
        most = (max(sent.get(axis, 0) for sent in side) for side in (predicted, measured))
        yield Row(name, f"{axis} bytes sent a step, busiest rank", "B", *most)


def _by_axis(sent: Iterable[tuple[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for axis, nbytes in sent:
        out[axis] = out.get(axis, 0) + nbytes
    return out


def compare_table(rows: Sequence[Row]) -> RenderableType:
    table = Table(title="planned against measured", title_justify="left")
    for name in ("layout", "figure", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name in ("layout", "figure") else "right")
    last = ""
    for row in rows:
        show = seconds if row.unit == "s" else size
        error = "equal" if row.error == 0 else f"{row.error:+.1%}"
        if last and row.layout != last:
            table.add_section()
        table.add_row(row.layout if row.layout != last else "", row.figure, show(row.predicted), show(row.measured), error)
        last = row.layout
    return table
