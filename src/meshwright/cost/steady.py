"""When a long step ends, from a shorter one: between warm-up and drain a schedule repeats itself.

In the middle of a step every stage does the same computations round after round, each on the next micro-batches. When a computation
ends depends on no more than a few rounds before it, by sums and maxima alone. So once every computation of several rounds in a row
comes exactly as much later as its like of k rounds before, all further rounds do, and k more rounds put off what follows by that much
(the cycle time of a timed event graph: Baccelli et al. 1992, Synchronization and Linearity, chapter 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from meshwright.cost.timeline import ChunkSeconds, Timeline, play_ends
from meshwright.schedule.actions import Kind, Schedule
from meshwright.schedule.clock import Waits
from meshwright.schedule.orders import layout_clock, layout_order, round_size, shorter, wound_order
from meshwright.spec.layout import Layout

ROUNDING = 1e-12
"""Of the step: times that differ by less are equal."""
MORE = 2
"""Rounds that a cycle must have come again for, at the least."""


def play_layout(
    layout: Layout, micro_batches: int, seconds: Sequence[Sequence[ChunkSeconds]], send: float, end: float | None = None
) -> Timeline:
    """What `play` makes of the layout's schedule; only what is asked for its spans plays all of it. `end`: its `step_end`, if known."""
    end = step_end(layout, micro_batches, seconds, send) if end is None else end
    whole = partial(_whole, layout, micro_batches)
    return Timeline(micro_batches, seconds, send, end, whole)


def step_end(layout: Layout, micro_batches: int, seconds: Sequence[Sequence[ChunkSeconds]], send: float) -> float:
    """When the last computation of the layout's schedule ends; `seconds` and `send` as for `play`. The same as playing all of it."""

    def ends(few: int) -> list[float]:
        return play_ends(layout_clock(layout, few), seconds, send)

    few = shorter(layout.schedule, layout.pp, micro_batches)
    short = ends(few)
    if few == micro_batches:
        return max(short)
    size = round_size(layout.schedule, layout.pp)
    cycle = _cycle(short, _middle(layout.schedule, layout.pp, few, layout.chunks, layout.async_ep), size, layout.pp)
    if cycle is None:
        return max(ends(micro_batches))
    times, left = divmod((micro_batches - few) // size, cycle.rounds)
    return max(ends(few + left * size) if left else short) + times * cycle.seconds


def _whole(layout: Layout, micro_batches: int) -> tuple[Schedule, Sequence[Waits]]:
    return layout_order(layout, micro_batches), layout_clock(layout, micro_batches)


class _Cycle(NamedTuple):
    """After so many rounds every computation comes again, so many seconds later."""

    rounds: int
    seconds: float


def _cycle(ends: Sequence[float], middle: Sequence[Sequence[int]], size: int, most: int) -> _Cycle | None:
    """The shortest, of at most `most` rounds of `size` micro-batches. As many micro-batches as a pipeline has stages may be under way
    between two that wait for each other, so a cycle may have as many rounds."""
    rows = [[ends[turn] for turn in turns] for turns in middle]
    if not rows:
        return None
    rounding, first = ROUNDING * max(ends), rows[0]
    for rounds in range(1, min(most, len(first) // size - MORE) + 1):
        apart = rounds * size
        late = first[apart] - first[0]
        if all(abs(then - now - late) <= rounding for row in rows for now, then in zip(row, row[apart:], strict=False)):
            return _Cycle(rounds, late)
    return None


@lru_cache(maxsize=256)
def _middle(name: str, stages: int, micro_batches: int, chunks: int, paired: bool) -> tuple[tuple[int, ...], ...]:
    """For each computation of each stage, which turn it is on the micro-batches between warm-up and drain; nothing where some of these
    run it and others do not."""
    micro = range(2 * stages, micro_batches - 2 * stages)
    rows: dict[tuple[int, Kind, int], dict[int, int]] = {}
    for number, turn in enumerate(wound_order(name, stages, micro_batches, chunks, paired)):
        if turn.action.micro_batch in micro:
            rows.setdefault((turn.stage, turn.action.kind, turn.action.chunk), {})[turn.action.micro_batch] = number
    if any(len(row) < len(micro) for row in rows.values()):
        return ()
    return tuple(tuple(row[i] for i in micro) for row in rows.values())
