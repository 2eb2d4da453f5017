"""Parts of a layer on one rank: its local sizes, and the linears and MLPs that they make. What each computes, saves and sends.

Formulas are the shapes of the operators themselves.

Symbols: S tokens of a sequence, T tokens of a micro-batch on this rank (1/cp of them), t those that its norm regions hold
(T/tp with sequence parallel), u those that it brings to the experts (always T/tp), D hidden size, q bytes of an activation element.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from meshwright.cost.ops import Collective, CollectiveOp, Elementwise, Gemm, Op, Under
from meshwright.spec.layout import Layout, RecomputePart
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES, StateBytes


class Part(NamedTuple):
    """Some consecutive operators, and the bytes that they keep for backward."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    saved: int
    recomputed: tuple[Op, ...] = ()
    """What of the backward is forward run again."""
    working: int = 0
    """Bytes that this makes while it is used."""
    passing: int = 0
    """The same of its forward beyond `working`, which count where backward runs it again."""


@dataclass(slots=True)
class Shapes:
    """Local sizes of one rank."""

    model: Model
    layout: Layout
    seq: int
    imbalance: float = 1.0
    """Rows of the fullest expert over the mean."""
    T: int = field(init=False)
    t: int = field(init=False)
    u: int = field(init=False)
    q: int = field(init=False)
    heads: int = field(init=False)
    kv_heads: int = field(init=False)

    def __post_init__(self) -> None:
        layout = self.layout
        self.T = layout.micro_batch * self.seq // layout.cp
        self.u = self.T // layout.tp
        self.t = self.u if layout.sp else self.T
        self.q = STATE_BYTES[layout.precision].parameter
        self.heads = self.model.heads // layout.tp
        self.kv_heads = max(1, self.model.kv_heads // layout.tp)

    @property
    def residual_bytes(self) -> int:
        """One hidden state in the norm regions."""
        return self.t * self.model.hidden * self.q

    @property
    def exact(self) -> int:
        """Bytes of an element of what is not rounded to the compute precision: logits of router and loss, statistics of norms."""
        return max(4, self.q)

    def product_bytes(self, rows: int, columns: int) -> int:
        """Of a weight's gradient that is made before it is added in the dtype that it is kept in."""
        bytes_ = StateBytes.of(self.layout)
        return rows * columns * self.q if bytes_.gradient > bytes_.compute else 0

    def columns_working(self, inner: int) -> int:
        """Of the backward of column-parallel linears: dx of all tokens, and with sequence parallel their gathered input and this rank's
        part of dx. In pieces dx is one piece, and beside it are the sum that arrives, the one that leaves and the one before."""
        whole, piece = self.T * inner * self.q, self.t * inner * self.q
        if self.layout.async_tp:
            return whole + 4 * piece
        return 2 * whole + piece if self.layout.sp else whole

    @property
    def norm(self) -> Elementwise:
        return Elementwise("norm", 2 * self.residual_bytes)

    @property
    def norm_backward(self) -> Elementwise:
        return Elementwise("norm", 4 * self.residual_bytes)

    @property
    def norm_saved(self) -> int:
        """A norm's input and its statistics; and its output, unless backward makes it again, for what reads it."""
        output = 0 if self.recomputes("norms") else self.residual_bytes
        return self.residual_bytes + self.t * self.statistics * self.exact + output

    def norm_ending(self, gradients: int) -> int:
        """Of the backward of the norm that ends a backward: its input and statistics, `gradients` as large as those, its own of the input
        among them, and what RMSNorm's operators make beside (`models/norm.py`)."""
        made = 0 if self.model.norm == "layernorm" else 3 if self.q < self.exact else 1
        rest = self.t * (made * self.model.hidden + self.statistics) * self.exact
        return (1 + gradients) * self.residual_bytes + rest

    @property
    def statistics(self) -> int:
        """Numbers that a norm keeps of each vector: 1 / rms, or mean and 1 / deviation."""
        return 1 if self.model.norm == "rmsnorm" else 2

    def recomputes(self, part: RecomputePart) -> bool:
        return self.layout.recompute == "selective" and part in self.layout.recompute_parts

    @property
    def residual(self) -> Elementwise:
        return Elementwise("residual", 3 * self.residual_bytes)

    def tp(self, op: CollectiveOp, nbytes: int) -> list[Collective]:
        layout = self.layout
        return [Collective("tp", op, layout.tp, layout.stride("tp"), nbytes)] if layout.tp > 1 else []

    def enter(self, width: int) -> list[Collective]:
        """Into a column-parallel set that reads `width` features: sequence parallel gathers the tokens."""
        return self.tp("all_gather", self.T * width * self.q) if self.layout.sp else []

    def hop(self, width: int) -> Collective:
        """One rank's tokens to the next of the ring, `width` features of each."""
        return Collective("tp", "send", self.layout.tp, self.layout.stride("tp"), self.t * width * self.q)

    def leave(self) -> list[Collective]:
        """Out of a row-parallel linear: partial sums meet."""
        return self.tp("reduce_scatter" if self.layout.sp else "all_reduce", self.T * self.model.hidden * self.q)


def columns(s: Shapes, name: str, inner: int, widths: dict[str, int]) -> Part:
    """Linears that read the same input of `inner` features, each with a share of its output features.

    Backward gathers the input again under the dx products, and sums dx under the weight gradients. The input is kept by whoever
    made it.
    """
    if s.layout.async_tp:
        return overlapped_columns(s, name, inner, widths)
    forward = [Gemm(f"{name}.{part}", s.T, width, inner) for part, width in widths.items()]
    dx = tuple(Gemm(f"{name}.{part} dx", s.T, inner, width) for part, width in widths.items())
    dw = tuple(Gemm(f"{name}.{part} dw", width, inner, s.T) for part, width in widths.items())
    whole = s.T * inner * s.q
    backward: tuple[Op, ...] = (*dx, *dw)
    if s.layout.sp:
        backward = (Under(s.tp("all_gather", whole)[0], dx), Under(s.tp("reduce_scatter", whole)[0], dw))
    elif s.layout.tp > 1:
        backward = (*dx, Under(s.tp("all_reduce", whole)[0], dw))
    return Part((*s.enter(inner), *forward), backward, 0)


def row(s: Shapes, name: str, width: int) -> Part:
    """A linear with a share of its `width` input features, which it keeps."""
    D = s.model.hidden
    if s.layout.async_tp:
        return overlapped_row(s, name, width)
    gather = s.tp("all_gather", s.T * D * s.q) if s.layout.sp else []
    backward: tuple[Op, ...] = (*gather, Gemm(f"{name} dx", s.T, width, D), Gemm(f"{name} dw", D, width, s.T))
    return Part((Gemm(name, s.T, D, width), *s.leave()), backward, s.T * width * s.q)


def overlapped_columns(s: Shapes, name: str, inner: int, widths: dict[str, int]) -> Part:
    """`columns` of async tensor parallel (`parallel/async_tp.py`): one rank's tokens at a time, each product under the hop of the
    next ones. In backward the input goes round one product before the sum that makes dx, under the same products."""
    hop = s.hop(inner)
    forward = tuple(Gemm(f"{name}.{part}", s.t, width, inner) for part, width in widths.items())
    dx = tuple(Gemm(f"{name}.{part} dx", s.t, inner, width) for part, width in widths.items())
    dw = tuple(Gemm(f"{name}.{part} dw", width, inner, s.T) for part, width in widths.items())
    between = s.layout.tp - 2
    backward: tuple[Op, ...] = (Under(hop, dx), *(Under(hop, dx, calls=2),) * between, Under(hop, dx), *dw)
    return Part((*(Under(hop, forward),) * (between + 1), *forward), backward, 0)


def overlapped_row(s: Shapes, name: str, width: int) -> Part:
    """`row` of async tensor parallel: the product of one rank's tokens, under the hop of the sum for those before."""
    D, hops = s.model.hidden, s.layout.tp - 1
    hop, product, dx = s.hop(D), Gemm(name, s.t, D, width), Gemm(f"{name} dx", s.t, width, D)
    backward: tuple[Op, ...] = (*(Under(hop, (dx,)),) * hops, dx, Gemm(f"{name} dw", D, width, s.T))
    return Part((product, *(Under(hop, (product,)),) * hops), backward, s.T * width * s.q)


def whole_linear(s: Shapes, name: str, tokens: int, inner: int, width: int) -> Part:
    """A linear that every tp rank holds whole."""
    dx, dw = Gemm(f"{name} dx", tokens, inner, width), Gemm(f"{name} dw", width, inner, tokens)
    return Part((Gemm(name, tokens, width, inner),), (dx, dw), 0)


def shared_down(s: Shapes, name: str, inner: int, width: int) -> Part:
    """A linear whole on every tp rank, whose output each uses for its heads."""
    own = whole_linear(s, name, s.t, inner, width)
    gather = s.tp("all_gather", s.T * width * s.q) if s.layout.sp else []
    back = s.tp("reduce_scatter" if s.layout.sp else "all_reduce", s.T * width * s.q)
    return Part((*own.forward, *gather), (*back, *own.backward), 0)


def gated_mlp(s: Shapes, name: str, ffn: int) -> Part:
    """Up (and gate), activation, down, with `ffn` hidden units on this rank."""
    gated = s.model.gated
    up = columns(s, f"{name}.gate_up", s.model.hidden, dict.fromkeys(("gate", "up") if gated else ("up",), ffn))
    down = row(s, f"{name}.down", ffn)
    hidden = activation(s, ffn * s.T)
    return Part(
        (*up.forward, *hidden.forward, *down.forward),
        (*hidden.recomputed, *down.backward, *hidden.backward, *up.backward),
        hidden.saved,
        hidden.recomputed,
        hidden.working,
    )


def activation(s: Shapes, units: int) -> Part:
    """From the outputs of gate and up to `units` hidden units. Keeps those, what their operators keep, and the hidden units, which
    the product after it reads; or the first alone, where backward makes the others again.

    Counted as the operators of `models/mlp.py` run one by one: an activation keeps its input, but relu its output, which a plain MLP's
    product keeps anyway; the product of a gate and `up` keeps both; the clamped form of GPT-OSS keeps three tensors more.
    """
    gated, kind = s.model.gated, s.model.activation
    io = (5 if gated else 2) * units * s.q
    forward, given = (Elementwise("activation", io),), 2 if gated else 1
    kept = 7 if kind == "swiglu_oai" else 2 * given - (kind == "relu")
    again = s.recomputes("activation")
    return Part(
        forward,
        (Elementwise("activation", 1.5 * io),),
        (given if again else kept) * units * s.q,
        forward if again else (),
        (kept - given) * units * s.q if again else 0,
    )
