"""Bytes a rank holds, by category: folds over its program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from meshwright.cost.offload import PLACES, away, keeps_parameters_away
from meshwright.cost.ops import Piece
from meshwright.cost.peak import Fullest, put_off_bytes
from meshwright.cost.program import Pieces, Program
from meshwright.cost.units import unit_buffer_bytes
from meshwright.schedule.actions import Schedule
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES, StateBytes

STEP_COUNTER_BYTES = 4
"""AdamW keeps its step number in an fp32 tensor beside each tensor that it updates: one a bucket."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a rank of `stage` at the fullest moment of a step."""

    stage: int
    categories: dict[str, int]
    away: dict[str, int] = field(default_factory=dict)
    """Bytes kept for the rank on the "host" or in a "file"; not a part of the total."""

    @property
    def total_bytes(self) -> int:
        return sum(self.categories.values())


def state_bytes(program: Program, layout: Layout, gradient_bytes: int | None = None) -> dict[str, int]:
    """Parameters, gradients and optimizer state on the device, and the buffers of what is offloaded, to the byte.

    `gradient_bytes`: of an element, if not the engine's own.
    """
    parameters = gradients = optimizer = 0
    for b in program.buckets:
        bytes_ = StateBytes.of(layout, cast=b.is_cast)
        if not keeps_parameters_away(b, layout):
            parameters += (b.owned if b.unit else b.numel) * bytes_.parameter
        gradients += (b.owned if layout.zero >= 2 else b.numel) * (gradient_bytes or bytes_.gradient)
        optimizer += (b.owned * bytes_.optimizer if layout.offload == "none" else 0) + STEP_COUNTER_BYTES
    held = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    return held if layout.offload == "none" else held | {"offload": away(program, layout).working}


def away_bytes(program: Program, layout: Layout) -> dict[str, int]:
    """What is kept elsewhere for a rank: bytes on the "host" or in a "file", to the byte; nothing without offload."""
    if layout.offload == "none":
        return {}
    return {PLACES[layout.offload_to]: away(program, layout).kept}


def stage_memories(
    program: Program, layout: Layout, schedule: Schedule, stages: Iterable[int], overhead: int
) -> Iterator[StageMemory]:
    """State, activations, temporaries and buffers at the fullest moment of a step, and what the runtime itself takes, of a rank of each
    of `stages`, which hold the same `program`.

    `overhead`: bytes of context, communication library and allocator.
    """
    fullest, away = Fullest(program, layout, schedule), away_bytes(program, layout)
    units = {"units": nbytes} if (nbytes := unit_buffer_bytes(program, layout)) else {}
    state, beside = state_bytes(program, layout), beside_bytes(program, schedule.micro_batches)
    for stage in stages:
        moment = fullest.of(stage)
        buffers = units | ({"whole gradients": moment.gradients} if moment.gradients else {})
        passing = {"activations": moment.activations, "working": moment.working + beside}
        yield StageMemory(stage, state | buffers | passing | {"overhead": overhead}, away)


def beside_bytes(program: Program, micro_batches: int) -> int:
    """What is there at any moment: the step's data, and a boundary tensor that waits to be sent while the next, if any, is received."""
    return program.data + min(2, micro_batches) * sum(c.bytes for c in program.boundary)


def in_flight_bytes(chunks: tuple[Pieces, ...], schedule: Schedule, stage: int, layout: Layout) -> int:
    """The most that forwards have kept, and halves of backwards put off, at once."""
    saved = [sum(piece.saved_bytes * repeat for piece, repeat in chunk) for chunk in chunks]
    if not schedule.splits_backward:
        return schedule.peak(stage, saved)
    width = STATE_BYTES[layout.precision].parameter
    return schedule.peak(stage, saved, [sum(put_off_bytes(piece, width) * repeat for piece, repeat in c) for c in chunks])


def passing_bytes(pieces: tuple[tuple[Piece, int], ...], activations: int, sent: int) -> dict[str, int]:
    """What comes and goes with micro-batches, the most of each; a boundary tensor may be waiting to be sent while the next is received.
    When the embedding makes its gradient, its micro-batch's activations are gone."""
    working = max((max(p.working_bytes, p.loss_bytes) for p, _ in pieces if p.name != "embedding"), default=0)
    return {"activations": activations, "working": working + 2 * sent}
