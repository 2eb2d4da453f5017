"""Bytes a rank holds, by category: folds over its program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from meshwright.cost.program import Piece, Program, boundary
from meshwright.schedule.actions import Schedule
from meshwright.schedule.stages import stage_layers
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.shards import stage_shards

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


def state_bytes(program: Program, layout: Layout) -> dict[str, int]:
    """Parameters, gradients and optimizer state, to the byte."""
    bytes_ = STATE_BYTES[layout.precision]
    whole = sum(bucket.numel for bucket in program.buckets)
    owned = whole // layout.state_shards
    return {
        "parameters": whole * bytes_.parameter,
        "gradients": whole * bytes_.gradient,
        "optimizer": owned * bytes_.optimizer + STEP_COUNTER_BYTES * len(program.buckets),
    }


def stage_memory(program: Program, layout: Layout, schedule: Schedule, stage: int, overhead: int) -> StageMemory:
    """State, activations of the micro-batches in flight, temporaries, and what the runtime itself takes.

    `overhead`: bytes of context, communication library and allocator.
    """
    sent = sum(c.bytes for c in program.boundary)
    passing = _passing(program.pieces, schedule.in_flight(stage), sent)
    return StageMemory(stage, state_bytes(program, layout) | passing | {"overhead": overhead})


def quick_stage_memory(
    model: Model, layout: Layout, pieces: tuple[tuple[Piece, int], ...], in_flight: int, stage: int, seq: int, overhead: int
) -> dict[str, int]:
    """The categories of `stage_memory` without planning the buckets: their padding is left out."""
    bytes_ = STATE_BYTES[layout.precision]
    numel = _stage_numel(model, layout.tp, layout.sp, layout.pp, stage)
    return {
        "parameters": numel * bytes_.parameter,
        "gradients": numel * bytes_.gradient,
        "optimizer": numel * bytes_.optimizer // layout.state_shards,
        **_passing(pieces, in_flight, sum(c.bytes for c in boundary(model, layout, seq, stage))),
        "overhead": overhead,
    }


def _passing(pieces: tuple[tuple[Piece, int], ...], in_flight: int, sent: int) -> dict[str, int]:
    """What comes and goes with micro-batches; a boundary tensor may be waiting to be sent while the next is received."""
    saved = sum(piece.saved_bytes * repeat for piece, repeat in pieces)
    return {"activations": saved * in_flight, "working": max(piece.working_bytes for piece, _ in pieces) + 2 * sent}


@lru_cache(maxsize=4096)
def _stage_numel(model: Model, tp: int, sp: bool, pp: int, stage: int) -> int:
    layout = Layout(tp=tp, sp=sp, pp=pp)
    layers = stage_layers(model.layers, pp)[stage]
    return sum(shard.numel for shard in stage_shards(model, layout, stage == 0, stage == pp - 1, layers, 0))
