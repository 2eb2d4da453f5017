"""A dry run as a Chrome trace, which Perfetto and chrome://tracing show: one process a stage, with a lane for the schedule, one for
computation, one for each axis that communicates, and a counter of live bytes.

Format: "Trace Event Format" (Google, 2016): complete events `X`, counters `C`, names `M`, times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshwright.spec.errors import UserError
from meshwright.trace.result import CATEGORIES, Attended, Product, Sent, Trace
from meshwright.trace.timeline import COMPUTE, Span, StageTimeline

SCHEDULE = "schedule"
ORDER = "order alone: each event takes one microsecond, whatever it does"
PREDICTED = "predicted seconds, by the cost model"


def write_chrome(trace: Trace, timelines: Sequence[StageTimeline], out: Path, clock: str = ORDER) -> None:
    """`timelines`: of the stages of `trace`; `clock`: what their times mean, for the reader of the file. Raises UserError when `out`
    cannot be written."""
    events = [event for each in timelines for event in _stage_events(each)]
    about = {"layout": str(trace.layout), "model": trace.model, "time": clock}
    try:
        out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


def _stage_events(timeline: StageTimeline) -> Iterator[dict[str, Any]]:
    stage = timeline.stage
    axes = sorted({span.lane for span in timeline.spans} - {COMPUTE})
    lanes = {lane: at for at, lane in enumerate((SCHEDULE, COMPUTE, *axes))}
    pid = stage.stage
    yield _name(pid, 0, "process_name", f"stage {stage.stage}, rank {stage.rank}")
    for lane, tid in lanes.items():
        yield _name(pid, tid, "thread_name", lane)
    for bar, (section, held) in zip(timeline.bars, stage.through_time(), strict=True):
        yield _complete(pid, lanes[SCHEDULE], section.name, bar.start, bar.end - bar.start, {})
        live = {name: held.get(name, 0) for name in CATEGORIES}
        yield {"ph": "C", "pid": pid, "tid": 0, "ts": _micro(bar.fullest), "name": "live bytes", "args": live}
    for span in timeline.spans:
        yield _complete(pid, lanes[span.lane], *_described(span))


def _described(span: Span) -> tuple[str, float, float, dict[str, Any]]:
    """Name, start, seconds and arguments."""
    name, args, what = "", {}, span.what
    if isinstance(what, str):
        name = what
    elif isinstance(what, Product):
        name = f"{what.op} {what.m} x {what.k} by {what.k} x {what.n}"
        args = {"path": what.path, "flops": what.flops, "backward": what.backward}
    elif isinstance(what, Attended):
        name = f"attention {what.heads} heads, {what.queries} over {what.keys}"
        args = {"path": what.path, "flops": what.flops, "backward": what.backward}
    elif isinstance(what, Sent):
        name = f"{what.axis} {what.op}"
        args = {"bytes": what.nbytes, "group_size": what.group_size, "group": what.group, "path": what.path}
    return name, span.start, span.seconds, args


def _complete(pid: int, tid: int, name: str, start: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": pid, "tid": tid, "ts": _micro(start), "dur": _micro(seconds), "name": name, "args": args}


def _name(pid: int, tid: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": what, "args": {"name": name}}


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)
