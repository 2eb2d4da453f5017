"""Which forwards and backwards a stage runs at the same time, so that what one sends travels while the other computes.

DualPipe's "overlapped forward and backward" (DeepSeek-AI 2024, arXiv 2412.19437, section 3.2.1, figure 4). The simulator and the
executor both take their pairs from here.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.schedule.actions import Action, Kind, Schedule

Unit = tuple[Action, ...]
"""What a stage begins together: one computation, the two of a pair, or a batch of communications."""


def is_pair(first: Action, second: Action) -> bool:
    """Whether two actions that follow each other directly can run at the same time.

    A forward, and then a whole backward: in this order what is in flight counts both anyway. Of different micro-batches, so that
    neither needs the other; on different chunks, so that one pass at a time uses the weights, gradients and communicators of a chunk.
    """
    return (
        (first.kind, second.kind) == (Kind.FORWARD, Kind.BACKWARD)
        and first.micro_batch != second.micro_batch
        and first.chunk != second.chunk
    )


def paired(units: Iterable[Unit]) -> list[Unit]:
    """The same in the same order, with two neighbours as one wherever they are a pair; an action is in one pair at most."""
    out: list[Unit] = []
    for unit in units:
        if out and len(out[-1]) == len(unit) == 1 and is_pair(out[-1][0], unit[0]):
            out[-1] = (*out[-1], *unit)
        else:
            out.append(unit)
    return out


def computations(schedule: Schedule, stage: int) -> list[Unit]:
    """What the stage computes, in order: one action, or the two of a pair where the schedule is `paired`."""
    single = [(action,) for action in schedule.actions[stage] if action.kind.is_compute]
    return paired(single) if schedule.paired else list(single)
