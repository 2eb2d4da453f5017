"""A dry run as a Chrome trace, which Perfetto and chrome://tracing show: one process a stage, with a counter of memory.

Format: "Trace Event Format" (Google, 2016): complete events `X`, counters `C`, times in microseconds. A dry run has an order but no
clock, so each event takes one microsecond: the length of an action is how many events it has.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshwright.spec.errors import UserError
from meshwright.trace.result import Attended, Change, Product, Sent, StageTrace, Trace


def write_chrome(trace: Trace, out: Path) -> None:
    """Raises UserError when `out` cannot be written."""
    events = [event for stage in trace.stages for event in _stage_events(stage)]
    try:
        out.write_text(
            json.dumps({"traceEvents": events, "otherData": {"layout": str(trace.layout), "model": trace.model}})
        )
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


def _stage_events(stage: StageTrace) -> Iterator[dict[str, Any]]:
    yield {
        "ph": "M",
        "pid": stage.stage,
        "name": "process_name",
        "args": {"name": f"stage {stage.stage}, rank {stage.rank}"},
    }
    now, live = 0, Counter[str]()
    for section in stage.sections:
        began = now
        for event in (event for part in section.parts for event in part.events):
            now += 1
            at = {"pid": stage.stage, "ts": now}
            if isinstance(event, Change):
                live[event.storage.category] += event.sign * event.storage.nbytes
            elif isinstance(event, Sent):
                args = {"bytes": event.nbytes, "group_size": event.group_size, "path": event.path}
                yield at | {"ph": "X", "tid": 2, "dur": 1, "name": f"{event.axis} {event.op}", "args": args}
            else:
                yield at | {"ph": "X", "tid": 1, "dur": 1, "name": _name(event), "args": {"path": event.path}}
        yield {"ph": "X", "pid": stage.stage, "tid": 0, "ts": began, "dur": max(1, now - began), "name": section.name}
        yield {"ph": "C", "pid": stage.stage, "ts": now, "name": "live bytes", "args": dict(live)}


def _name(event: Product | Attended) -> str:
    if isinstance(event, Product):
        return f"{event.op} {event.m} x {event.k} by {event.k} x {event.n}"
    return f"attention {event.heads} heads, {event.queries} over {event.keys}"
