"""Closed forms of what stages hold against the lists of actions."""

import numpy as np
import pytest

from meshwright.planner.flights import by_chunks, deferred, held, in_flight
from meshwright.planner.space import Pipeline
from meshwright.schedule.actions import Kind, Schedule
from meshwright.schedule.orders import make_order
from meshwright.spec.errors import UserError

PIPELINES = [
    *(Pipeline(pp, name, 1) for name in ("gpipe", "1f1b", "zb-h1") for pp in range(1, 6)),
    *(Pipeline(pp, name, 2) for name in ("zb-v", "dualpipe-v") for pp in range(1, 6)),
    *(Pipeline(pp, "interleaved", chunks) for pp in range(2, 6) for chunks in range(2, 5)),
]


@pytest.mark.parametrize("p", PIPELINES, ids=str)
def test_what_stages_hold_is_what_the_lists_hold(p: Pipeline) -> None:
    played = {m: order for m in range(1, 21) if (order := order_of(p, m))}
    m = np.array([*played])
    counts = [f(p, m) for f in (in_flight, held, deferred)]
    for at, order in enumerate(played.values()):
        few = p.schedule == "zb-v" and m[at] < p.pp  # then more may be put off
        for stage in range(p.pp):
            flights, anything, put_off = (int(count[stage, at]) for count in counts)
            assert flights == order.in_flight(stage)
            assert put_off == order.deferred(stage) or (few and put_off <= order.deferred(stage))
            assert anything == order.held(stage) or (few and anything <= order.held(stage))


@pytest.mark.parametrize("p", [p for p in PIPELINES if p.schedule == "interleaved"], ids=str)
def test_chunks_of_interleaved_stages_fill_in_rounds(p: Pipeline) -> None:
    m = p.pp * np.arange(1, 5)
    for at, count in enumerate(m.tolist()):
        order = make_order(p.schedule, p.pp, count, p.chunks)
        for stage in range(p.pp):
            forwards = order.actions[stage][: in_flight(p, m)[stage, at]]
            assert all(action.kind is Kind.FORWARD for action in forwards)
            assert by_chunks(p, m)[stage, :, at].tolist() == [
                sum(action.chunk == chunk for action in forwards) for chunk in range(p.chunks)
            ]


def order_of(p: Pipeline, m: int) -> Schedule | None:
    """None where the schedule cannot run so many."""
    try:
        return make_order(p.schedule, p.pp, m, p.chunks)
    except UserError:
        return None
