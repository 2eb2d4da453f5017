"""Schedules of one's own, as a table: one row a stage, one action a cell.

    # placement: v
    F0, F1, F0.1, I0.1, W0.1
    F0, F0.1

F forward, B backward, I and W its two halves (input, weights), each with the micro-batch and, after a dot, the chunk. Empty cells
are skipped, so that a table may be drawn in time steps. Sends and receives are put in; a table that has its own (sF0, rF0, sB0,
rB0) is taken as it is. Chunks are placed in a loop, or in a V when the first line says so.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import check_complete, check_schedule
from meshwright.schedule.communication import with_communication
from meshwright.schedule.stages import placement
from meshwright.spec.errors import UserError

_PLACEMENTS = {"loop": "interleaved", "v": "zb-v"}
"""A schedule that is placed so, to ask `stages.placement` for."""

_CELL = re.compile(rf"({'|'.join(kind.value for kind in Kind)})(\d+)(?:\.(\d+))?")


def read_schedule(path: Path, stages: int, chunks: int, micro_batches: int) -> Schedule:
    """The schedule in the file, checked, for `chunks` chunks on each of `stages` stages.

    Raises UserError that names the row, the column and the cell of what cannot be read, and the stages and actions of what cannot
    run.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    shape = _placement_name(path, lines)
    if shape == "v" and chunks != 2:
        raise UserError(f"{path}: a V places 2 chunks on each stage, not {chunks}")
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip(" ,\t") and not line.startswith("#")]
    if len(rows) != stages:
        raise UserError(f"{path}: {len(rows)} rows for {stages} stages: write one row a stage")
    orders = [_row(path, number, line, chunks, micro_batches) for number, line in rows]
    placed = placement(_PLACEMENTS[shape], stages, chunks)
    given = Schedule(path.stem, micro_batches, tuple(map(tuple, orders)), placed)
    if all(action.kind.is_compute for order in orders for action in order):
        check_complete(given)
        given = with_communication(given.name, micro_batches, orders, placed)
    check_schedule(given)
    return given


def write_schedule(schedule: Schedule, path: Path, communication: bool = False) -> None:
    """Write what `read_schedule` reads; without `communication`, only what is computed."""
    shape = _shape(schedule)
    out = io.StringIO()
    out.write(f"# placement: {shape}\n")
    table = csv.writer(out, lineterminator="\n")
    for actions in schedule.actions:
        table.writerow([str(action) for action in actions if communication or action.kind.is_compute])
    try:
        path.write_text(out.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _row(path: Path, number: int, line: str, chunks: int, micro_batches: int) -> list[Action]:
    out = []
    for column, cell in enumerate(next(csv.reader([line])), start=1):
        if not (text := cell.strip()):
            continue
        match = _CELL.fullmatch(text)
        action = match and Action(Kind(match[1]), int(match[2]), int(match[3] or 0))
        if not action or action.micro_batch >= micro_batches or action.chunk >= chunks:
            dotted = f", and .1 to .{chunks - 1} after it for the other chunks" if chunks > 1 else ""
            raise UserError(
                f"{path}: row {number}, column {column}: {text!r}: write {', '.join(kind.value for kind in Kind)} followed by a "
                f"micro-batch from 0 to {micro_batches - 1}{dotted}, such as F0"
            )
        out.append(action)
    return out


def _placement_name(path: Path, lines: list[str]) -> str:
    match = re.fullmatch(r"#\s*placement\s*:\s*(.*?)[\s,]*", lines[0]) if lines else None
    if not match:
        return "loop"
    if (name := match[1].lower()) not in _PLACEMENTS:
        raise UserError(f"{path}: row 1: unknown placement {match[1]!r}: legal: {', '.join(_PLACEMENTS)}")
    return name


def _shape(schedule: Schedule) -> str:
    for name, like in _PLACEMENTS.items():
        if schedule.placement == placement(like, schedule.stages, schedule.chunks):
            return name
    raise UserError(f"schedule {schedule.name}: its chunks are placed neither in a loop nor in a V: a table cannot say so")
