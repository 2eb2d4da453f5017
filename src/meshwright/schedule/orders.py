"""The schedules themselves, by name; GPipe, 1F1B and interleaved 1F1B.

An order says what a stage computes; `communication.py` puts in what it sends and receives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from meshwright.schedule.actions import Action, Kind, Schedule, act
from meshwright.schedule.clock import Waits, wind_clock
from meshwright.schedule.communication import with_communication
from meshwright.schedule.dualpipe import dualpipe_v
from meshwright.schedule.stages import FOLDED, placement
from meshwright.schedule.zero_bubble import zb_h1, zb_v
from meshwright.spec.errors import UserError, choices
from meshwright.spec.layout import Layout


@lru_cache(maxsize=256)
def make_schedule(name: str, stages: int, micro_batches: int, chunks: int = 1, paired: bool = False) -> Schedule:
    """The action lists of the named schedule, `chunks` chunks on each of `stages` stages.

    Raises UserError for a name without one, and for chunks or micro-batches that the schedule is not made for.
    """
    order = make_order(name, stages, micro_batches, chunks, paired)
    return with_communication(name, micro_batches, order.actions, order.placement, paired)


@lru_cache(maxsize=256)
def make_order(name: str, stages: int, micro_batches: int, chunks: int = 1, paired: bool = False) -> Schedule:
    """What `make_schedule` computes, without what it sends: enough to price it."""
    if name not in _ORDERS:
        raise choices(name, _ORDERS, "pipeline schedule")
    _check_chunks(name, chunks)
    check_micro_batches(name, stages, micro_batches)
    orders = tuple(tuple(_ORDERS[name](stage, stages, micro_batches, chunks)) for stage in range(stages))
    return Schedule(name, micro_batches, orders, placement(name, stages, chunks), paired)


def layout_schedule(layout: Layout, micro_batches: int) -> Schedule:
    """The schedule a layout runs; without a pipeline, forward and backward of each micro-batch in turn."""
    return make_schedule(layout.schedule, layout.pp, micro_batches, layout.chunks, layout.async_ep)


def layout_order(layout: Layout, micro_batches: int) -> Schedule:
    """What the stages of a layout compute, without what they send."""
    return make_order(layout.schedule, layout.pp, micro_batches, layout.chunks, layout.async_ep)


def brief_order(layout: Layout, micro_batches: int) -> Schedule:
    """`layout_order` of so few micro-batches that it holds as much at its fullest as with all of them (see `shorter`)."""
    return layout_order(layout, shorter(layout.schedule, layout.pp, micro_batches))


def check_micro_batches(name: str, stages: int, micro_batches: int) -> None:
    """Raise UserError for micro-batches that the named schedule cannot run on so many stages."""
    if micro_batches < 1:
        raise UserError(f"a schedule needs at least 1 micro-batch, got {micro_batches}")
    if name == "interleaved" and micro_batches % stages:
        below = micro_batches // stages * stages
        near = f"{below} or {below + stages}" if below else f"{stages}"
        raise UserError(
            f"schedule interleaved takes micro-batches in rounds of one a stage: {micro_batches} is not a multiple of "
            f"{stages} stages; try {near}"
        )
    if name == "dualpipe-v" and micro_batches < 2 * stages:
        raise UserError(
            f"schedule dualpipe-v needs at least 2 x {stages} stages = {2 * stages} micro-batches, got {micro_batches}"
        )


def layout_clock(layout: Layout, micro_batches: int) -> tuple[Waits, ...]:
    """`layout_order` with what each computation waits for: to price it again and again."""
    return wound_order(layout.schedule, layout.pp, micro_batches, layout.chunks, layout.async_ep)


@lru_cache(maxsize=256)
def wound_order(name: str, stages: int, micro_batches: int, chunks: int = 1, paired: bool = False) -> tuple[Waits, ...]:
    """`make_order`, wound."""
    return tuple(wind_clock(make_order(name, stages, micro_batches, chunks, paired)))


def round_size(name: str, stages: int) -> int:
    """After how many micro-batches the named schedule repeats itself between warm-up and drain."""
    return stages if name == "interleaved" else 1


def shorter(name: str, stages: int, micro_batches: int) -> int:
    """So few micro-batches that the schedule still has every phase that it has with `micro_batches`, and some rounds of its middle."""
    if name == "gpipe":  # no middle
        return micro_batches
    enough = 6 * stages + 3 * round_size(name, stages)
    return min(micro_batches, enough + (micro_batches - enough) % stages)  # what is left is most often whole cycles


def _check_chunks(name: str, chunks: int) -> None:
    if name == "interleaved":
        if chunks < 2:
            raise UserError(f"schedule interleaved needs at least 2 chunks a stage, got {chunks}; with 1 it is 1f1b")
    elif chunks != (legal := 2 if name in FOLDED else 1):
        raise UserError(f"schedule {name} holds {legal} chunk{'s'[: legal - 1]} a stage, got {chunks}")


def _gpipe(stage: int, stages: int, m: int, chunks: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)."""
    return [act(Kind.FORWARD, i) for i in range(m)] + [act(Kind.BACKWARD, i) for i in range(m)]


def _one_forward_one_backward(stage: int, stages: int, m: int, chunks: int) -> list[Action]:
    """PipeDream-flush (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1).

    After `stages - 1 - stage` warm-up forwards, forwards and backwards alternate, so a stage never holds more than
    `stages - stage` micro-batches.
    """
    forwards = [act(Kind.FORWARD, i) for i in range(m)]
    return _alternate(forwards, [act(Kind.BACKWARD, i) for i in range(m)], min(m, stages - 1 - stage))


def _interleaved(stage: int, stages: int, m: int, chunks: int) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2.2): `stages` micro-batches through the first chunk, the same through the
    next, and so on; backwards likewise from the last chunk. The bubble is 1F1B's divided by `chunks`.

    A stage's warm-up takes the first round through all chunks but the last, and then two forwards more than the stage after it.
    """
    turns = range(m * chunks)
    micro_batch = [turn // (stages * chunks) * stages + turn % stages for turn in turns]
    chunk = [turn // stages % chunks for turn in turns]
    forwards = [act(Kind.FORWARD, micro_batch[turn], chunk[turn]) for turn in turns]
    backwards = [act(Kind.BACKWARD, micro_batch[turn], chunks - 1 - chunk[turn]) for turn in turns]
    return _alternate(forwards, backwards, min(m * chunks, 2 * (stages - 1 - stage) + (chunks - 1) * stages))


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    out = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        out += [forward, backward]
    return out + backwards[len(backwards) - warm_up :]


Order = Callable[[int, int, int, int], list[Action]]
"""(stage, stages, micro-batches, chunks) to the stage's computations."""

_ORDERS: dict[str, Order] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb-h1": zb_h1,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
}
