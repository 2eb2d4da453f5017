"""The program of one rank: what it computes, saves and sends for one micro-batch and one step.

Memory, time and traffic are folds over these lists; `trace` and the engine's ledger must agree with them. Formulas are the
shapes of the operators themselves.

Symbols: T tokens of a micro-batch, t the tokens that a rank's norm regions hold (T, or T/tp with sequence parallel),
D hidden size, q bytes of an activation element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from meshwright.schedule.buckets import Bucket, plan_buckets
from meshwright.schedule.stages import rank_shards, stage_layers
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.shards import Seat
from meshwright.spec.workload import Workload

CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True, slots=True)
class Gemm:
    """(m x k) by (k x n)."""

    name: str
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused causal attention. Forward has two matrix products, backward five (FlashAttention-2, arXiv 2307.08691)."""

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    window: int | None
    backward: bool

    @property
    def flops(self) -> float:
        """Of the entries under the causal (and window) mask only."""
        span = min(self.window or self.length, self.length)
        pairs = span * (self.length - span) + span * (span + 1) / 2
        return (5 if self.backward else 2) * 2.0 * self.batch * self.heads * pairs * self.head_dim


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Work bound by memory: `bytes` read and written."""

    name: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Collective:
    """`stride` is the distance in ranks between neighbours. `bytes` follows nccl-tests (see `parallel/ledger.py`)."""

    axis: str
    op: CollectiveOp
    group_size: int
    stride: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Under:
    """A collective that runs while `work` is computed."""

    collective: Collective
    work: tuple[Gemm, ...]


Op = Gemm | Attention | Elementwise | Collective | Under


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the model (embedding, one layer, head) run for one micro-batch."""

    name: str
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    saved_bytes: int
    """Kept from forward for backward."""
    working_bytes: int = 0
    """The largest temporary of the piece."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one rank does in a step: `pieces` (with how often each occurs) for every micro-batch, then the step's end."""

    pieces: tuple[tuple[Piece, int], ...]
    boundary: tuple[Collective, ...]
    """Sent for every micro-batch."""
    buckets: tuple[Bucket, ...]
    gradient_reductions: tuple[Collective, ...]
    """In bucket order; each may run under the backward of the last micro-batch."""
    step_end: tuple[Collective, ...]
    """After backward, in order: nothing hides them."""
    optimizer: Elementwise


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank: its stage and its tensor-parallel index. Other coordinates do not change the program."""

    stage: int = 0
    tp: int = 0


@dataclass(slots=True)
class _Shapes:
    """Local sizes of one rank."""

    model: Model
    layout: Layout
    seq: int
    T: int = field(init=False)
    t: int = field(init=False)
    q: int = field(init=False)
    heads: int = field(init=False)
    kv_heads: int = field(init=False)

    def __post_init__(self) -> None:
        self.T = self.layout.micro_batch * self.seq
        self.t = self.T // self.layout.tp if self.layout.sp else self.T
        self.q = STATE_BYTES[self.layout.precision].parameter
        self.heads = self.model.heads // self.layout.tp
        self.kv_heads = max(1, self.model.kv_heads // self.layout.tp)

    @property
    def residual_bytes(self) -> int:
        """One hidden state in the norm regions."""
        return self.t * self.model.hidden * self.q

    def tp(self, op: CollectiveOp, nbytes: int) -> list[Collective]:
        layout = self.layout
        return [Collective("tp", op, layout.tp, layout.stride("tp"), nbytes)] if layout.tp > 1 else []

    def enter(self) -> list[Collective]:
        """Into a column-parallel set: sequence parallel gathers the tokens."""
        return self.tp("all_gather", self.T * self.model.hidden * self.q) if self.layout.sp else []

    def leave(self) -> list[Collective]:
        """Out of a row-parallel linear: partial sums meet."""
        return self.tp("reduce_scatter" if self.layout.sp else "all_reduce", self.T * self.model.hidden * self.q)


def rank_program(model: Model, layout: Layout, workload: Workload, place: Place) -> Program:
    """The program of the rank at `place`. The layout must have passed `spec.legality.check_layout`."""
    buckets = plan_buckets(rank_shards(model, layout, place.stage, Seat(tp=place.tp)), layout)
    return Program(
        pieces=stage_pieces(model, layout, workload.seq, place),
        boundary=boundary(model, layout, workload.seq, place.stage),
        buckets=buckets,
        gradient_reductions=tuple(_gradient_reductions(layout, buckets)),
        step_end=tuple(_step_end(model, layout, buckets)),
        optimizer=_optimizer(layout, buckets),
    )


def stage_pieces(model: Model, layout: Layout, seq: int, place: Place) -> tuple[tuple[Piece, int], ...]:
    """(piece, how often it occurs) of a stage, in model order."""
    local = _local(layout)
    windows = [model.window(i) for i in stage_layers(model.layers, layout.pp)[place.stage]]
    pieces = [(layer_piece(model, local, seq, w), windows.count(w)) for w in dict.fromkeys(windows)]
    if place.stage == 0:
        pieces.insert(0, (embedding_piece(model, local, seq), 1))
    if place.stage == layout.pp - 1:
        pieces.append((head_piece(model, local, seq, place.tp), 1))
    return tuple(pieces)


def _local(layout: Layout) -> Layout:
    """The part of a layout that a piece depends on, so that a search prices each piece once."""
    if layout.order[0] != "tp":
        return layout
    return Layout(
        tp=layout.tp,
        sp=layout.sp,
        micro_batch=layout.micro_batch,
        recompute=layout.recompute,
        precision=layout.precision,
        order=layout.order,
    )


@lru_cache(maxsize=512)
def layer_piece(model: Model, layout: Layout, seq: int, window: int | None) -> Piece:
    """One transformer layer on one rank."""
    s = _Shapes(model, layout, seq)
    D, q, ffn = model.hidden, s.q, model.ffn // layout.tp
    q_width, kv_width = s.heads * model.head_dim, s.kv_heads * model.head_dim
    qkv = {"q": q_width, "k": kv_width, "v": kv_width}
    gate_up = dict.fromkeys(("gate", "up") if model.gated else ("up",), ffn)
    heads = (layout.micro_batch, s.heads, seq, model.head_dim, window)
    attention_io = (2 * q_width + 2 * kv_width) * s.T * q
    rotary_io = 4 * (q_width + kv_width) * s.T * q if model.rope else 0
    mlp_io = (5 if model.gated else 2) * ffn * s.T * q
    norm = Elementwise("norm", 2 * s.residual_bytes)
    residual = Elementwise("residual", 3 * s.residual_bytes)
    forward: list[Op] = [
        norm, *s.enter(), *_linears("attention.qkv", s.T, D, qkv), Elementwise("rotary", rotary_io),
        Attention("attention", *heads, backward=False), Gemm("attention.out", s.T, D, q_width), *s.leave(), residual,
        norm, *s.enter(), *_linears("mlp.gate_up", s.T, D, gate_up), Elementwise("activation", mlp_io),
        Gemm("mlp.down", s.T, D, ffn), *s.leave(), residual,
    ]  # fmt: skip
    backward: list[Op] = [
        *_row_backward(s, "mlp.down", ffn), Elementwise("activation", 1.5 * mlp_io), *_column_backward(s, "mlp.gate_up", gate_up),
        Elementwise("norm", 4 * s.residual_bytes),
        *_row_backward(s, "attention.out", q_width), Attention("attention", *heads, backward=True),
        Elementwise("rotary", rotary_io), *_column_backward(s, "attention.qkv", qkv), Elementwise("norm", 4 * s.residual_bytes),
    ]  # fmt: skip
    log_sum_exp = s.T * s.heads * 4
    mlp_saved = (4 if model.gated else 2) * ffn * s.T * q
    saved = 4 * s.residual_bytes + attention_io + log_sum_exp + mlp_saved
    if layout.recompute == "full":
        backward = [*_recomputed(forward), *backward]
        return Piece("layer", tuple(forward), tuple(backward), s.residual_bytes, working_bytes=saved)
    return Piece("layer", tuple(forward), tuple(backward), saved)


@lru_cache(maxsize=512)
def embedding_piece(model: Model, layout: Layout, seq: int) -> Piece:
    """Token (and position) lookup; its weight gradient is scattered row by row."""
    s = _Shapes(model, layout, seq)
    whole = s.T * model.hidden * s.q
    forward: tuple[Op, ...] = (Elementwise("lookup", 2 * whole), *s.leave())
    gather = s.tp("all_gather", whole) if layout.sp else []
    return Piece("embedding", forward, (*gather, Elementwise("lookup", 3 * whole)), s.T * 8)


@lru_cache(maxsize=512)
def head_piece(model: Model, layout: Layout, seq: int, tp_rank: int) -> Piece:
    """Final norm, output head and loss. The logits are turned to fp32 (or stay fp64) and kept as a softmax."""
    s = _Shapes(model, layout, seq)
    share = -(-model.vocab // layout.tp)
    vocab = min(share, model.vocab - tp_rank * share)
    exact = max(4, s.q)
    logits = s.T * vocab
    loss = s.tp("all_reduce", s.T * exact) + s.tp("all_reduce", 2 * s.T * exact)
    norm = Elementwise("norm", 2 * s.residual_bytes)
    forward: tuple[Op, ...] = (
        norm,
        *s.enter(),
        Gemm("head", s.T, vocab, model.hidden),
        Elementwise("loss", logits * (s.q + 4 * exact)),
        *loss,
    )
    backward: tuple[Op, ...] = (
        Elementwise("loss", logits * (2 * exact + s.q)),
        *_column_backward(s, "head", {"weight": vocab}),
        Elementwise("norm", 4 * s.residual_bytes),
    )
    saved = 2 * s.residual_bytes + logits * exact
    return Piece("head", forward, backward, saved, working_bytes=logits * (exact + s.q))


def _linears(name: str, tokens: int, inner: int, widths: dict[str, int]) -> list[Gemm]:
    return [Gemm(f"{name}.{part}", tokens, width, inner) for part, width in widths.items()]


def _row_backward(s: _Shapes, name: str, width: int) -> list[Op]:
    D = s.model.hidden
    gather = s.tp("all_gather", s.T * D * s.q) if s.layout.sp else []
    return [*gather, Gemm(f"{name} dx", s.T, width, D), Gemm(f"{name} dw", D, width, s.T)]


def _column_backward(s: _Shapes, name: str, widths: dict[str, int]) -> list[Op]:
    """The input is gathered again under the dx products, and dx is summed under the weight gradients."""
    D = s.model.hidden
    whole = s.T * D * s.q
    dx = tuple(Gemm(f"{name}.{part} dx", s.T, D, width) for part, width in widths.items())
    dw = tuple(Gemm(f"{name}.{part} dw", width, D, s.T) for part, width in widths.items())
    if s.layout.tp == 1:
        return [*dx, *dw]
    if not s.layout.sp:
        return [*dx, Under(s.tp("all_reduce", whole)[0], dw)]
    return [Under(s.tp("all_gather", whole)[0], dx), Under(s.tp("reduce_scatter", whole)[0], dw)]


def _recomputed(forward: list[Op]) -> list[Op]:
    """Full recompute runs the layer again up to the last tensor that backward needs: the input of `mlp.down`.

    The sum after it is not repeated (PyTorch's checkpoint stops early), nor is that product.
    """
    last = next(i for i, op in enumerate(forward) if isinstance(op, Gemm) and op.name == "mlp.down")
    return forward[:last]


def boundary(model: Model, layout: Layout, seq: int, stage: int) -> tuple[Collective, ...]:
    """What a stage sends for a micro-batch: an activation onwards, a gradient back."""
    send = Collective("pp", "send", layout.pp, layout.stride("pp"), _Shapes(model, layout, seq).residual_bytes)
    return (send,) * ((stage < layout.pp - 1) + (stage > 0))


def _gradient_reductions(layout: Layout, buckets: tuple[Bucket, ...]) -> Iterator[Collective]:
    if layout.dp == 1:
        return
    op: CollectiveOp = "reduce_scatter" if layout.state_shards > 1 else "all_reduce"
    size, stride = STATE_BYTES[layout.precision].gradient, layout.stride("dp")
    for bucket in buckets:
        yield Collective("dp", op, layout.dp, stride, bucket.numel * size)


def _step_end(model: Model, layout: Layout, buckets: tuple[Bucket, ...]) -> Iterator[Collective]:
    """Token count, sums over replicas, loss and gradient norm, and ZeRO's parameter gather."""
    bytes_ = STATE_BYTES[layout.precision]
    if layout.dp > 1:
        yield Collective("dp", "all_reduce", layout.dp, layout.stride("dp"), 8)
    groups = {
        "tp": ("tp", layout.tp, layout.stride("tp")),
        "kv": ("tp", max(1, layout.tp // model.kv_heads), layout.stride("tp")),
        "embedding": ("pp", 2, layout.stride("pp") * (layout.pp - 1)),
    }
    for bucket in buckets:
        if bucket.partial and bucket.replicas:
            axis, size, stride = groups[bucket.replicas]
            yield Collective(axis, "all_reduce", size, stride, bucket.owned * bytes_.gradient)
    for axis in ("tp", "cp", "pp", "dp"):
        if layout.degree(axis) > 1:
            yield Collective(axis, "all_reduce", layout.degree(axis), layout.stride(axis), 16)
    if layout.state_shards > 1:
        stride = layout.stride("dp")
        for bucket in buckets:
            yield Collective("dp", "all_gather", layout.dp, stride, bucket.numel * bytes_.parameter)


def _optimizer(layout: Layout, buckets: tuple[Bucket, ...]) -> Elementwise:
    """AdamW over the owned elements reads and writes all it holds; the gradients are also put in place, normed and clipped."""
    bytes_ = STATE_BYTES[layout.precision]
    whole = sum(bucket.numel for bucket in buckets)
    owned = sum(bucket.owned for bucket in buckets)
    update = owned * (2 * (bytes_.optimizer + bytes_.parameter) + bytes_.gradient)
    return Elementwise("optimizer", update + whole * bytes_.gradient + owned * 3 * bytes_.gradient)
