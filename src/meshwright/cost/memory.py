"""Bytes a rank holds, by category: folds over its program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshwright.cost.gradients import gradient_buffer_bytes
from meshwright.cost.offload import PLACES, away, keeps_parameters_away
from meshwright.cost.ops import Gemm, Piece, Under
from meshwright.cost.program import Pieces, Program
from meshwright.cost.units import unit_buffer_bytes
from meshwright.schedule.actions import Schedule
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES, StateBytes

STEP_COUNTER_BYTES = 4
"""AdamW keeps its step number in an fp32 tensor beside each tensor that it updates: one a bucket."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak bytes of a rank of `stage`."""

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


def stage_memory(program: Program, layout: Layout, schedule: Schedule, stage: int, overhead: int) -> StageMemory:
    """State, activations of the micro-batches in flight, temporaries, and what the runtime itself takes.

    `overhead`: bytes of context, communication library and allocator.
    """
    sent = sum(c.bytes for c in program.boundary)
    held = in_flight_bytes(program.chunks, schedule, stage, layout)
    passing = passing_bytes(program.chunks, held, sent, schedule.paired)
    units = {"units": nbytes} if (nbytes := unit_buffer_bytes(program, layout)) else {}
    whole = gradient_buffer_bytes(program, layout, schedule.micro_batches)
    buffers = units | ({"whole gradients": whole} if whole else {})
    categories = state_bytes(program, layout) | buffers | passing | {"overhead": overhead}
    return StageMemory(stage, categories, away_bytes(program, layout))


def in_flight_bytes(chunks: tuple[Pieces, ...], schedule: Schedule, stage: int, layout: Layout) -> int:
    """The most that forwards have kept, and halves of backwards put off, at once."""
    saved = [sum(piece.saved_bytes * repeat for piece, repeat in chunk) for chunk in chunks]
    if not schedule.splits_backward:
        return schedule.peak(stage, saved)
    width = STATE_BYTES[layout.precision].parameter
    return schedule.peak(stage, saved, [sum(put_off_bytes(piece, width) * repeat for piece, repeat in c) for c in chunks])


def put_off_bytes(piece: Piece, width: int) -> int:
    """What the weights' half of a backward needs: the inputs of linears, once for those that share one, and the gradients of their
    outputs; elements of `width` bytes."""
    inputs: dict[tuple[str, int], int] = {}
    gradients = 0
    for op in piece.backward:
        for gemm in op.work if isinstance(op, Under) else (op,):
            if isinstance(gemm, Gemm) and gemm.is_weight_gradient:
                inputs[gemm.name.rsplit(".", 1)[0] if "." in gemm.name else gemm.name, gemm.n] = (
                    gemm.n * gemm.k * gemm.groups
                )
                gradients += gemm.m * gemm.k
    return width * (sum(inputs.values()) + gradients)


def passing_bytes(chunks: Sequence[Pieces], activations: int, sent: int, paired: bool) -> dict[str, int]:
    """What comes and goes with micro-batches; a boundary tensor may be waiting to be sent while the next is received. The two passes of
    a pair, of two chunks, have temporaries at the same time."""
    working = [max(piece.working_bytes for piece, _ in chunk) for chunk in chunks]
    return {"activations": activations, "working": (sum(working) if paired else max(working)) + 2 * sent}
