"""A piece of the program as other software runs it: the package's own operators, rewritten by a `Practice`.

The split stays what it is; what changes is which operators are fused, how the loss is computed, and what is kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.cost.ops import Attention, Collective, CollectiveOp, Elementwise, Gemm, Op, Piece, Under
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.program import Program
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES

SCORE_BYTES = {"fused-softmax": 1.0, "unfused": 3.0}
"""Elements kept for backward for every score, in units of the compute precision: the normalised scores; where a kernel runs for each
step, also the scaled and masked ones."""
NORM_KEPT = 4
"""A norm run operator by operator keeps its input and its normalised input in fp32 too: twice two bf16 residuals."""
LOSS_BYTES = {"fused": 4, "parallel": 12, "whole": 26}
"""At its peak, for every logit that a rank holds. fused: the logits, turned into their gradient in place, and a copy while that is
read. parallel (Megatron's vocab-parallel loss): bf16, fp32, the exponents, and their gradient. whole: those and the copies that
PyTorch's own loss makes of them."""
LOSS_PASSES = {"fused": 8, "parallel": 40, "whole": 60}
"""Bytes moved for every logit, forward and backward together."""


def as_practised(piece: Piece, practice: Practice, model: Model, layout: Layout, tokens: int) -> Piece:
    """`tokens`: of a micro-batch on this rank before sequence parallel cuts them."""
    if practice == OWN:
        return piece
    forward, backward = piece.forward, piece.backward
    if practice.whole_recompute and (again := _common_prefix(forward, backward)):
        backward = (*forward, *backward[again:])
    if practice.frozen:
        backward = tuple(kept for op in backward for kept in _without_weight_gradients(op))
    if practice.gathers_experts and layout.ep > 1 and layout.etp > 1:
        forward, backward = (tuple(part for op in ops for part in _dispatch(op, layout)) for ops in (forward, backward))
    out = replace(piece, forward=forward, backward=backward)
    if piece.name == "head":
        return _loss(out, practice, model, layout, tokens)
    return _kept(out, practice, model, layout, tokens) if piece.name == "layer" else out


def with_gradients_of(program: Program, layout: Layout, size: int | None) -> Program:
    """`program` with gradients of `size` bytes an element on the wire; None: as the engine has them."""
    own = STATE_BYTES[layout.precision].gradient
    if size is None or size == own:
        return program

    def resized(calls: tuple[Collective, ...]) -> tuple[Collective, ...]:
        return tuple(replace(c, bytes=c.bytes * size // own) for c in calls)

    return replace(program, gradient_reductions=resized(program.gradient_reductions), scatters=resized(program.scatters))


def with_buckets_of(program: Program, size: int | None) -> Program:
    """`program` with its gradients reduced in buckets of `size` bytes; None: as the engine has them."""
    if size is None:
        return program
    wire: dict[tuple[str, CollectiveOp, int, int], int] = {}
    for c in program.gradient_reductions:
        key = c.axis, c.op, c.group_size, c.stride
        wire[key] = wire.get(key, 0) + c.bytes
    buckets = (Collective(*key, min(size, total - at)) for key, total in wire.items() for at in range(0, total, size))
    return replace(program, gradient_reductions=tuple(buckets))


def _kept(piece: Piece, practice: Practice, model: Model, layout: Layout, tokens: int) -> Piece:
    """What unfused kernels keep beside what fused ones do."""
    size = STATE_BYTES[layout.precision].parameter
    extra = 0.0
    if practice.attention in SCORE_BYTES and layout.recompute != "selective":
        pairs = sum(op.batch * op.heads * op.length**2 // op.share for op in piece.forward if isinstance(op, Attention))
        extra += SCORE_BYTES[practice.attention] * size * pairs
    if not practice.fused_norms:
        extra += 2 * NORM_KEPT * size * tokens * model.hidden / (layout.tp if layout.sp else 1)
    if layout.recompute == "full":
        return replace(piece, working_bytes=piece.working_bytes + int(extra))
    return replace(piece, saved_bytes=piece.saved_bytes + int(extra))


def _loss(piece: Piece, practice: Practice, model: Model, layout: Layout, tokens: int) -> Piece:
    """The loss's passes over the logits, and their peak; a loss over whole logits first gathers them from the tensor-parallel ranks."""
    if practice.loss is None:
        return piece
    own = [op.bytes for op in (*piece.forward, *piece.backward) if isinstance(op, Elementwise) and op.name == "loss"]
    share = 1 if practice.loss == "whole" else layout.tp
    logits = tokens * -(-model.vocab // share)
    factor = LOSS_PASSES[practice.loss] * logits / sum(own)
    gathers: tuple[Op, ...] = ()
    if practice.loss == "whole" and layout.tp > 1:
        whole = logits * STATE_BYTES[layout.precision].parameter
        gathers = (Collective("tp", "all_gather", layout.tp, layout.stride("tp"), whole),)
    residual = piece.saved_bytes - tokens * -(-model.vocab // layout.tp) * max(4, STATE_BYTES[layout.precision].parameter)
    return replace(
        piece,
        forward=(*_scaled(piece.forward, factor), *gathers),
        backward=tuple(_scaled(piece.backward, factor)),
        saved_bytes=max(0, residual),
        working_bytes=LOSS_BYTES[practice.loss] * logits,
        loss_bytes=0,
    )


def _scaled(ops: tuple[Op, ...], factor: float) -> Iterator[Op]:
    for op in ops:
        yield replace(op, bytes=op.bytes * factor) if isinstance(op, Elementwise) and op.name == "loss" else op


def is_recomputed(piece: Piece) -> bool:
    """Whether its backward runs its forward again first."""
    return _common_prefix(piece.forward, piece.backward) > 0


def _common_prefix(forward: tuple[Op, ...], backward: tuple[Op, ...]) -> int:
    """How many operators of the forward a backward runs again before its own."""
    same = 0
    while same < min(len(forward), len(backward)) and forward[same] == backward[same]:
        same += 1
    return same


def _dispatch(op: Op, layout: Layout) -> Iterator[Op]:
    """Megatron sends each token's row once over the expert-parallel ranks, and gathers it among those that share an expert; the
    engine sends it to each of these."""
    if isinstance(op, Collective) and op.axis == "ep" and op.op == "all_to_all":
        yield Collective("ep", "all_to_all", layout.ep, layout.etp, op.bytes // layout.etp)
        yield Collective("etp", "all_gather", layout.etp, 1, op.bytes)
    else:
        yield op


def _without_weight_gradients(op: Op) -> Iterator[Op]:
    if isinstance(op, Under):
        kept = tuple(work for work in op.work if not (isinstance(work, Gemm) and work.is_weight_gradient))
        yield from (replace(op, work=kept),) if kept else (op.collective,) * op.calls
    elif not (isinstance(op, Gemm) and op.is_weight_gradient):
        yield op
