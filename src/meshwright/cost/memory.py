"""Bytes a rank holds, by category: folds over its program."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.ops import Piece
from meshwright.cost.program import Program
from meshwright.schedule.actions import Schedule
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES

STEP_COUNTER_BYTES = 4
"""AdamW keeps its step number in an fp32 tensor beside each tensor that it updates: one a bucket."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak bytes of a rank of `stage`."""

    stage: int
    categories: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.categories.values())


def state_bytes(program: Program, layout: Layout, gradient_bytes: int | None = None) -> dict[str, int]:
    """Parameters, gradients and optimizer state, to the byte. `gradient_bytes`: of an element, if not the engine's own."""
    bytes_ = STATE_BYTES[layout.precision]
    owned = sum(bucket.owned for bucket in program.buckets)
    parameters = sum(b.owned if b.unit else b.numel for b in program.buckets)
    gradients = sum(b.owned if layout.zero >= 2 else b.numel for b in program.buckets)
    return {
        "parameters": parameters * bytes_.parameter,
        "gradients": gradients * (gradient_bytes or bytes_.gradient),
        "optimizer": owned * bytes_.optimizer + STEP_COUNTER_BYTES * len(program.buckets),
    }


def stage_memory(program: Program, layout: Layout, schedule: Schedule, stage: int, overhead: int) -> StageMemory:
    """State, activations of the micro-batches in flight, temporaries, and what the runtime itself takes.

    `overhead`: bytes of context, communication library and allocator.
    """
    sent = sum(c.bytes for c in program.boundary)
    saved = [sum(piece.saved_bytes * repeat for piece, repeat in chunk) for chunk in program.chunks]
    passing = passing_bytes(program.pieces, schedule.peak(stage, saved), sent)
    return StageMemory(stage, state_bytes(program, layout) | passing | {"overhead": overhead})


def passing_bytes(pieces: tuple[tuple[Piece, int], ...], activations: int, sent: int) -> dict[str, int]:
    """What comes and goes with micro-batches; a boundary tensor may be waiting to be sent while the next is received."""
    return {"activations": activations, "working": max(piece.working_bytes for piece, _ in pieces) + 2 * sent}
