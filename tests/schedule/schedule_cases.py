"""Schedules for the tests: every name in every legal shape, and schedules written by hand."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from meshwright.schedule.actions import Action, Kind, Placement, Schedule
from meshwright.schedule.check import check_schedule
from meshwright.schedule.orders import make_schedule
from meshwright.spec.errors import UserError
from meshwright.spec.layout import PAIRING, SCHEDULES

Shape = tuple[str, int, int, int]
"""What `make_schedule` takes: name, stages, micro-batches, chunks."""

PairedShape = tuple[str, int, int, int, bool]
"""And whether its pairs run at the same time."""


@st.composite
def shapes(draw: st.DrawFn, stages: int = 8, micro_batches: int = 16, names: tuple[str, ...] = SCHEDULES) -> Shape:
    name, p, m = draw(st.sampled_from(names)), draw(st.integers(1, stages)), draw(st.integers(1, micro_batches))
    if name == "interleaved":
        return name, p, p * draw(st.integers(1, max(1, micro_batches // p))), draw(st.integers(2, 4))
    if name == "dualpipe-v":
        return name, p, 2 * p + m - 1, 2
    return name, p, m, 2 if name == "zb-v" else 1


def legal_shapes(stages: int, micro_batches: int) -> list[Shape]:
    """Every one up to these sizes."""
    out: list[Shape] = []
    for p in range(1, stages + 1):
        for m in range(1, micro_batches + 1):
            out += [(name, p, m, 1) for name in ("gpipe", "1f1b", "zb-h1")] + [("zb-v", p, m, 2)]
            out += [("interleaved", p, m, v) for v in (2, 3) if m % p == 0]
            out += [("dualpipe-v", p, m, 2)] if m >= 2 * p else []
    return out


@st.composite
def paired_shapes(draw: st.DrawFn, stages: int = 8, micro_batches: int = 16) -> PairedShape:
    return *draw(shapes(stages, micro_batches, PAIRING)), True


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int, int]:
    """A schedule, and one action in it by stage and position."""
    schedule = make_schedule(*draw(shapes(5, 6)))
    stage = draw(st.integers(0, schedule.stages - 1))
    return schedule, stage, draw(st.integers(0, len(schedule.actions[stage]) - 1))


def action(word: str) -> Action:
    """From a word such as "sF0.1"."""
    kind = next(k for k in sorted(Kind, key=lambda kind: -len(kind.value)) if word.startswith(k.value))
    micro_batch, _, chunk = word.removeprefix(kind.value).partition(".")
    return Action(kind, int(micro_batch), int(chunk or 0))


def written(*stages: str, placement: Placement | None = None) -> Schedule:
    """A schedule from lines such as "F0 sF0 rB0 B0", on one chunk a stage unless placed otherwise."""
    actions = tuple(tuple(action(word) for word in line.split()) for line in stages)
    forwards = sum(a.kind is Kind.FORWARD and a.chunk == 0 for a in actions[0])
    return Schedule("by hand", forwards, actions, placement or tuple((stage,) for stage in range(len(stages))))


def with_stage(schedule: Schedule, stage: int, actions: list[Action]) -> Schedule:
    changed = (*schedule.actions[:stage], tuple(actions), *schedule.actions[stage + 1 :])
    return Schedule("broken", schedule.micro_batches, changed, schedule.placement)


def refusal(schedule: Schedule, most_in_flight: int | None = None) -> str:
    with pytest.raises(UserError) as refused:
        check_schedule(schedule, most_in_flight)
    assert "\n" not in str(refused.value)
    assert schedule.name in str(refused.value)
    return str(refused.value)
