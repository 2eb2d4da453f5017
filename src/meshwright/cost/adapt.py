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

FRAGMENTED = 0.05
"""Of what is kept for backward: what an allocator that fragments takes beside it. Fitted on which runs of 30B and 65B on A100 ran out of
memory; of 422 runs of 13B, which took no part, it refuses two more and misses none fewer."""
GRADIENT_PASSES = 4
"""Over the owned part of a gradient in the update (`program._optimizer`), beside the one over all of it."""
SCORE_BYTES = {"fused-softmax": 2.5, "unfused": 3.0}
"""Kept for backward for every score, in units of the compute precision: what softmax gives, the dropout's mask and what it gives (arXiv
2205.05198, section 4.1); where a kernel runs for each step, softmax in fp32 and in the compute precision."""
SCORE_WORKING = {"fused-softmax": 4.0, "unfused": 12.0}
"""The same at the peak of a layer's backward: what is kept, and the gradients of each step."""
ANGLES = 4
"""Sine and cosine, looked up by position for queries and for keys."""
NORM_KEPT = 4
"""A norm run operator by operator keeps its input and its normalised input in fp32 too: twice two bf16 residuals."""
LOSS_BYTES = {"chunked": 4, "fused": 4, "parallel": 12, "whole": 16}
"""At its peak, for every logit that a rank holds at once. chunked and fused: the logits, turned into their gradient in place, and a copy
while that is read. parallel (Megatron's vocab-parallel loss): bf16, fp32, the exponents, and their gradient. whole: the bf16 logits of
two micro-batches, the fp32 softmax, and the gradients of both of its steps (github.com/Aleph-Alpha/scaling, cross_entropy.py and
parallel_module.py)."""
GATHERED_BYTES = 8
"""Beside them, where a whole loss gathers its logits: the parts, their concatenation, and the gradients of both, in blocks of other
sizes than those of the fp32 tensors, so that the allocator cannot hand them on."""
LOSS_PASSES = {"chunked": 8, "fused": 8, "parallel": 40, "whole": 60}
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
    if practice.separate_columns:
        backward = tuple(_summed_apart(op) for op in backward)
    if practice.keeps_gathered:
        backward = tuple(kept for op in backward for kept in _without_gather(op))
    out = replace(piece, forward=forward, backward=backward)
    if piece.name == "head":
        return _loss(out, practice, model, layout, tokens)
    return _kept(out, practice, model, layout, tokens) if piece.name == "layer" else out


def with_gradients_of(program: Program, layout: Layout, practice: Practice) -> Program:
    """`program` with gradients of the width that `practice` has, on the wire and in the update; summed whole, they cross the wire in the
    engine's width."""
    own = STATE_BYTES[layout.precision].gradient
    size = practice.gradient_bytes or own
    sums = program.gradient_reductions
    if practice.whole_gradients and layout.zero < 2:
        sums = tuple(c._replace(op="all_reduce") if c.op == "reduce_scatter" else c for c in sums)
    elif size != own:
        sums = _resized(sums, size, own)
    if size == own:
        return replace(program, gradient_reductions=sums)
    saved = (own - size) * sum(b.numel + GRADIENT_PASSES * b.owned for b in program.buckets)
    return replace(
        program,
        gradient_reductions=sums,
        scatters=_resized(program.scatters, size, own),
        optimizer=program.optimizer._replace(bytes=program.optimizer.bytes - saved),
    )


def _resized(calls: tuple[Collective, ...], size: int, own: int) -> tuple[Collective, ...]:
    return tuple(c._replace(bytes=c.bytes * size // own) for c in calls)


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
    """What unfused kernels keep beside what fused ones do, and other software beside the engine."""
    size = STATE_BYTES[layout.precision].parameter
    extra, working = 0.0, piece.working_bytes
    if practice.attention in SCORE_BYTES:
        pairs = sum(op.batch * op.heads * op.length**2 // op.share for op in piece.forward if isinstance(op, Attention))
        extra += SCORE_BYTES[practice.attention] * size * pairs if layout.recompute == "none" else 0
        working += int(SCORE_WORKING[practice.attention] * size * pairs)
    if not practice.fused_norms:
        extra += 2 * NORM_KEPT * size * tokens * model.hidden / (layout.tp if layout.sp else 1)
    if practice.fused_activation and _keeps_activation(piece, model, layout):
        extra -= size * tokens * model.ffn / layout.tp
    if practice.packed_qkv and model.rope and model.latent is None:
        extra += size * tokens * (model.heads + model.kv_heads) * model.head_dim / layout.tp
        extra += ANGLES * size * tokens * model.head_dim
    if practice.keeps_gathered and layout.sp:
        extra += 2 * size * tokens * model.hidden * (1 - 1 / layout.tp)
    if layout.recompute == "full":
        return replace(piece, working_bytes=working + int(extra))
    share = 1 + FRAGMENTED if practice.fragments else 1.0
    return replace(piece, saved_bytes=int(share * (piece.saved_bytes + extra)), working_bytes=working)


def _keeps_activation(piece: Piece, model: Model, layout: Layout) -> bool:
    """Whether the engine keeps the activation of a dense, gated MLP beside its inputs and its product."""
    is_routed = any(isinstance(op, Gemm) and op.name.startswith("moe.") for op in piece.forward)
    again = {"selective": {"activation", "mlp"} & {*layout.recompute_parts}, "full": True, "none": False}[layout.recompute]
    return model.gated and not is_routed and not again


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
        working_bytes=(LOSS_BYTES[practice.loss] + (GATHERED_BYTES if gathers else 0))
        * (min(logits, tokens * model.hidden) if practice.loss == "chunked" else logits),
        loss_bytes=0,
    )


def _scaled(ops: tuple[Op, ...], factor: float) -> Iterator[Op]:
    for op in ops:
        yield op._replace(bytes=op.bytes * factor) if isinstance(op, Elementwise) and op.name == "loss" else op


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


def _summed_apart(op: Op) -> Op:
    """Each linear of a gated MLP's first set sums its own dx."""
    if not isinstance(op, Under) or op.collective.op != "all_reduce":
        return op
    linears = sum(isinstance(work, Gemm) and work.name.startswith("mlp.gate_up") for work in op.work)
    return op._replace(calls=linears) if linears > 1 else op


def _without_gather(op: Op) -> Iterator[Op]:
    """The gather, for backward, of what a column-parallel set read; a gather of gradients stays."""
    if isinstance(op, Under) and op.collective.axis == "tp" and op.collective.op == "all_gather":
        yield from op.work
    else:
        yield op


def _without_weight_gradients(op: Op) -> Iterator[Op]:
    if isinstance(op, Under):
        kept = tuple(work for work in op.work if not (isinstance(work, Gemm) and work.is_weight_gradient))
        yield from (op._replace(work=kept),) if kept else (op.collective,) * op.calls
    elif not (isinstance(op, Gemm) and op.is_weight_gradient):
        yield op
