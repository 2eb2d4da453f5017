"""The pieces of a model on one rank: embedding, layer, head. What each computes, saves and sends for one micro-batch.

Formulas are the shapes of the operators themselves.

Symbols: S tokens of a sequence, T tokens of a micro-batch on this rank (1/cp of them), t those that its norm regions hold
(T/tp with sequence parallel), u those that it brings to the experts (always T/tp), D hidden size, q bytes of an activation element.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from meshwright.cost.ops import Attention, Collective, CollectiveOp, Elementwise, Gemm, Op, Piece, Under
from meshwright.spec.context import kv_copies
from meshwright.spec.layout import Layout, RecomputePart
from meshwright.spec.model import Experts, LatentAttention, Model
from meshwright.spec.precision import STATE_BYTES, StateBytes

SINK_DIMS = 8
"""That a sink adds to queries and keys."""


@dataclass(frozen=True, slots=True)
class Part:
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


@lru_cache(maxsize=512)
def layer_piece(
    model: Model, layout: Layout, seq: int, window: int | None, moe: bool = False, imbalance: float = 1.0
) -> Piece:
    """One transformer layer on one rank; with experts, on the one that holds the fullest, which gets `imbalance` times the mean."""
    s = Shapes(model, layout, seq, imbalance)
    return _layer(s, attention_core(s, window), moe)


def coreless_layer_piece(model: Model, layout: Layout, seq: int) -> Piece:
    """A dense layer without its attention core: with the price of that (`attention_core`) added, what a layer costs. It depends on
    tokens alone, however they are cut into sequences."""
    return _layer(Shapes(model, layout, seq), Part((), (), 0), moe=False)


def _layer(s: Shapes, core: Part, moe: bool) -> Piece:
    model, layout = s.model, s.layout
    attention = heads(s, core) if model.latent is None else latent(s, model.latent, core)
    mlp = experts(s, model.experts) if moe and model.experts else gated_mlp(s, "mlp", model.ffn // layout.tp)
    # Of a model with experts the search prices layers without them first, whose working memory must not be the larger.
    working = max(mlp.working, _last_product_working(s, 0 if model.experts else model.ffn // layout.tp))
    if s.recomputes("mlp"):
        working, mlp = working + mlp.saved + mlp.passing, _recomputed(mlp)
    forward = (s.norm, *attention.forward, s.residual, s.norm, *mlp.forward, s.residual)
    norm_again = (s.norm,) if s.recomputes("norms") else ()
    mlp_norm_again = norm_again * _readers(s, model.experts if moe else None)
    backward = (*mlp.backward, *mlp_norm_again, s.norm_backward, *attention.backward, *norm_again, s.norm_backward)
    mlp_norm_saved = s.residual_bytes if norm_again and s.recomputes("mlp") else s.norm_saved
    saved = s.norm_saved + attention.saved + mlp_norm_saved + mlp.saved
    # Of the residual, of the norm's output, of its input; the first of them, if not gathered, is that of attention's last product too,
    # and counted where that is put off.
    ending = s.norm_ending(3 if layout.sp else 2)
    if layout.recompute == "full":
        again = _up_to_last_saved(forward)
        working += saved + mlp.passing
        return Piece("layer", forward, (*again, *backward), s.residual_bytes, working, again, ending_bytes=ending)
    working += s.residual_bytes if norm_again else 0
    recomputed = (*attention.recomputed, *mlp.recomputed, *mlp_norm_again, *norm_again)
    return Piece("layer", forward, backward, saved, working, recomputed, ending_bytes=ending)


def _readers(s: Shapes, experts: Experts | None) -> int:
    """How often backward asks for the output of the second norm: an MLP that runs again makes it once, as plain linears do; experts
    need it for the shared one, and the router for exact logits."""
    if experts is None or s.recomputes("mlp"):
        return 1
    return bool(experts.shared_ffn) + (s.q == s.exact)


def _last_product_working(s: Shapes, width: int) -> int:
    """Of the backward of the layer's last product, the first of its backward: the gathered gradient, dx, and the weight's gradient
    before it is added in the dtype that it is kept in."""
    whole = s.T * s.model.hidden * s.q if s.layout.sp else 0
    return whole + s.T * width * s.q + s.product_bytes(s.model.hidden, width)


def _recomputed(part: Part) -> Part:
    """`part` run again in backward. It keeps nothing: its input, the norm's output, is kept by the norm."""
    again = _up_to_last_saved(part.forward)
    return Part(part.forward, (*again, *part.backward), 0, again)


def heads(s: Shapes, core: Part) -> Part:
    """Grouped-query attention."""
    model = s.model
    q_width, kv_width = s.heads * model.head_dim, s.kv_heads * model.head_dim
    qkv = columns(s, "attention.qkv", model.hidden, {"q": q_width, "k": kv_width, "v": kv_width})
    rotary = Elementwise("rotary", 4 * (q_width + kv_width) * s.T * s.q if model.rope else 0)
    out = row(s, "attention.out", q_width)
    saved = (q_width + 2 * kv_width) * s.T * s.q
    if model.qk_norm:
        saved += (q_width + kv_width) * s.T * s.q + (s.heads + s.kv_heads) * s.T * s.exact
    return Part(
        (*qkv.forward, rotary, *core.forward, *out.forward),
        (*out.backward, *core.backward, rotary, *qkv.backward),
        qkv.saved + saved + core.saved + out.saved,
        core.recomputed,
    )


def latent(s: Shapes, latent: LatentAttention, core: Part) -> Part:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1). The down-projections are whole on every tp rank; sequence
    parallel gathers their narrow outputs instead of the hidden states."""
    D = s.model.hidden
    queries = s.heads * (latent.nope_dim + latent.rope_dim)
    kv_width = latent.kv_rank + latent.rope_dim
    kv_down = shared_down(s, "attention.kv_down", D, kv_width)
    kv_up = whole_linear(s, "attention.kv_up", s.T, latent.kv_rank, s.heads * (latent.nope_dim + latent.value_dim))
    saved = (kv_width + latent.kv_rank) * s.T * s.q + s.T * s.exact
    if latent.q_rank is None:
        q = columns(s, "attention", D, {"q": queries})
    else:
        down = shared_down(s, "attention.q_down", D, latent.q_rank)
        up = whole_linear(s, "attention.q_up", s.T, latent.q_rank, queries)
        q = Part((*down.forward, *up.forward), (*up.backward, *down.backward), 0)
        saved += 2 * latent.q_rank * s.T * s.q + s.T * s.exact
    rotary = Elementwise("rotary", 4 * s.heads * latent.rope_dim * s.T * s.q)
    out = row(s, "attention.out", s.heads * latent.value_dim)
    qkv_saved = (2 * queries + s.heads * latent.value_dim) * s.T * s.q
    return Part(
        (*q.forward, *kv_down.forward, *kv_up.forward, rotary, *core.forward, *out.forward),
        (*out.backward, *core.backward, rotary, *kv_up.backward, *kv_down.backward, *q.backward),
        saved + qkv_saved + core.saved + out.saved,
        core.recomputed,
    )


def shared_down(s: Shapes, name: str, inner: int, width: int) -> Part:
    """A linear whole on every tp rank, whose output each uses for its heads."""
    own = whole_linear(s, name, s.t, inner, width)
    gather = s.tp("all_gather", s.T * width * s.q) if s.layout.sp else []
    back = s.tp("reduce_scatter" if s.layout.sp else "all_reduce", s.T * width * s.q)
    return Part((*own.forward, *gather), (*back, *own.backward), 0)


def attention_core(s: Shapes, window: int | None) -> Part:
    """Between projections: fused attention, and what context parallelism sends for it.

    Queries, keys and values are kept by whoever made them, the output by the linear that reads it.
    """
    layout, latent = s.layout, s.model.latent
    kv_heads, head_dim, value_dim = s.kv_heads, s.model.head_dim, s.model.head_dim
    if latent is not None:
        kv_heads, head_dim, value_dim = s.heads, latent.nope_dim + latent.rope_dim, latent.value_dim
    forward, backward = _ring(s, kv_heads, head_dim, value_dim, window)
    if layout.cp_ulysses > 1:
        copies = kv_copies(kv_heads, layout.cp_ulysses)
        inward = _all_to_all(s, s.heads * head_dim + kv_heads * copies * (head_dim + value_dim))
        outward = _all_to_all(s, s.heads * value_dim)
        forward, backward = (inward, *forward, outward), (outward, *backward, inward)
    again = tuple(op for op in forward if isinstance(op, Attention)) if s.recomputes("core") else ()
    inputs, own = _core_saved(s, kv_heads, head_dim, value_dim, window)
    return Part(forward, (*again, *backward), inputs + (0 if again else own), again)


def _core_saved(s: Shapes, kv_heads: int, head_dim: int, value_dim: int, window: int | None) -> tuple[int, int]:
    """Of the inputs, what their makers do not keep: copies of key-value heads for ranks that share one, and, after rotary, angles
    that are looked up by position. Of the core itself: log-sum-exps; under Ulysses its output before that goes home, and, where a
    ring is inside, keys and values packed for it; a mask, and the dims of the sink's key, where the whole sequence is here
    (`models/attention.py`)."""
    layout, model = s.layout, s.model
    inputs = own = 0
    if layout.cp > 1 and model.rope:
        inputs += 4 * s.seq // layout.cp * (model.latent.rope_dim if model.latent else head_dim) * s.q
    if layout.cp_ulysses > 1:
        copies, pair = kv_copies(kv_heads, layout.cp_ulysses), kv_heads * (head_dim + value_dim) * s.T * s.q
        inputs += (copies - 1) * pair
        own += s.heads * value_dim * s.T * s.q + (copies * pair if layout.cp_ring > 1 else 0)
    if layout.cp_ring == 1 and ((window is not None and window < s.seq) or model.sinks):
        own += s.seq * (s.seq + model.sinks) * s.q
        sent = kv_heads * kv_copies(kv_heads, layout.cp_ulysses)
        own += model.sinks * SINK_DIMS * (s.heads + sent) * s.T * s.q
        keys = sent // layout.cp_ulysses * layout.micro_batch
        own += model.sinks * keys * (head_dim + SINK_DIMS + value_dim) * s.q
    return inputs, own + s.T * s.heads * 4


def _ring(
    s: Shapes, kv_heads: int, head_dim: int, value_dim: int, window: int | None
) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Forward and backward of the attention itself: `parallel/ring.py` sends keys and values, and in backward their gradients,
    while it computes with the block that it has."""
    layout, ring = s.layout, s.layout.cp_ring
    op = (layout.micro_batch, s.heads, s.seq, head_dim, value_dim, window)
    block, block_back = (Attention("attention", *op, backward=b, share=layout.cp * ring) for b in (False, True))
    if ring == 1:
        return (block,), (block_back,)
    held = max(1, kv_heads // layout.cp_ulysses)
    elements = layout.micro_batch * held * (s.seq // ring) * (head_dim + value_dim)
    keys_values, gradients = (
        Collective("cp", "send", ring, layout.stride("cp") * layout.cp_ulysses, elements * size)
        for size in (s.q, max(4, s.q))
    )
    forward = (Under(keys_values, (block,)),) * (ring - 1)
    backward = (Under(keys_values, (block_back,)), Under(gradients, ())) * (ring - 1)
    return (*forward, block), (*backward, block_back)


def _all_to_all(s: Shapes, width: int) -> Collective:
    return Collective("cp", "all_to_all", s.layout.cp_ulysses, s.layout.stride("cp"), s.T * width * s.q)


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


def experts(s: Shapes, experts: Experts) -> Part:
    """The routed experts, their outputs brought back to every rank of tp, and the shared expert (`parallel/expert.py`)."""
    parts, shared, outputs = routed(s, experts), shared_expert(s, experts), expert_outputs(s, experts)
    return Part(
        (*parts.forward, *outputs.forward, *shared.forward),
        (*shared.backward, *parts.backward, *outputs.backward),
        parts.saved + outputs.saved + shared.saved,
        (*shared.recomputed, *parts.recomputed),
        max(shared.working, parts.working),
        parts.passing,
    )


def shared_expert(s: Shapes, experts: Experts) -> Part:
    """The expert that every token goes to, if there is one."""
    return gated_mlp(s, "moe.shared", experts.shared_ffn // s.layout.tp) if experts.shared_ffn else Part((), (), 0)


def expert_outputs(s: Shapes, experts: Experts) -> Part:
    """Each rank of tp brings its own tokens to the experts; without sequence parallel all of them need all outputs.

    Of the norm's output the router reads an exact copy, and nothing else keeps it but a shared expert: so much is not saved.
    """
    gather = tuple(s.tp("all_gather", s.T * s.model.hidden * s.q) if not s.layout.sp else [])
    is_kept = s.q == s.exact or experts.shared_ffn or s.recomputes("norms")
    return Part(gather, gather, 0 if is_kept else -s.residual_bytes)


def routed(s: Shapes, experts: Experts) -> Part:
    """Router, dispatch, the experts' products, combine. Of the layout it sees u, ep and etp only.

    A rank sends `rows` and gets `here`. This is the one with the fullest expert, whose others get the mean; where it has all of them, they
    share the rest.
    """
    model, layout, D = s.model, s.layout, s.model.hidden
    ranks = layout.ep * layout.etp
    rows, held, ffn = s.u * experts.top_k * layout.etp, experts.count // layout.ep, experts.ffn // layout.etp
    fullest = ceil(rows // held * s.imbalance) if s.imbalance > 1 else 0
    here = rows if layout.ep == 1 or not fullest else rows - rows // held + fullest

    def all_to_all(nbytes: int) -> list[Collective]:
        return [Collective("ep", "all_to_all", ranks, 1, nbytes)] if ranks > 1 else []

    travel = all_to_all(here * D * s.q)
    parts = ("gate", "up") if model.gated else ("up",)
    router = whole_linear(s, "moe.router", s.u, D, experts.count)
    up = [Gemm(f"moe.experts.{part}", here, ffn, D, held, fullest) for part in parts]
    down = Gemm("moe.experts.down", here, D, ffn, held, fullest)
    hidden = activation(s, ffn * here)
    permute = Elementwise("permute", 4 * rows * D * s.q)
    up_back = [back for part in parts for back in _grouped_backward(f"moe.experts.{part}", here, ffn, D, held, fullest)]
    down_back = _grouped_backward("moe.experts.down", here, D, ffn, held, fullest)
    forward = (
        *router.forward, *all_to_all(experts.count * layout.etp * 8), permute, *travel, *up, *hidden.forward, down, *travel, permute,
    )  # fmt: skip
    backward = (
        permute, *travel, *hidden.recomputed, *down_back, *hidden.backward, *up_back, *travel, permute, *router.backward,
    )  # fmt: skip
    biased = (len(parts) + 1) * here * 8 if experts.bias else 0  # the expert of each row, for each product
    saved = hidden.saved + (here + rows) * D * s.q + biased + _routing_saved(s, experts)
    # Outputs, while they are weighed: as they are, and added up over the ranks that share an expert.
    exact = (rows + rows // layout.etp) * D * s.exact if s.q < s.exact else 0
    arrived = (here + rows) * D * s.q if ranks > 1 else 0  # rows that came, on either way, until the forward is over
    return Part(forward, backward, saved, hidden.recomputed, max(hidden.working, exact, s.product_bytes(D, ffn)), arrived)


def fullest_rank(experts: Experts, layout: Layout, imbalance: float) -> float:
    """Rows of the rank with the fullest expert over the mean of ranks."""
    held = experts.count // layout.ep
    return 1.0 if layout.ep == 1 else (held - 1 + imbalance) / held


def _routing_saved(s: Shapes, experts: Experts) -> int:
    """Scores, chosen weights before and after they are made to sum to one, and the sum; the order of rows on each way, in int64; and
    the exact copies of its input and weights that the router reads."""
    visits = s.u * experts.top_k
    weights = (2 * visits + s.u if experts.normalized else visits) * s.exact
    ways = 4 if s.layout.ep * s.layout.etp > 1 else 2
    orders = (ways * visits * s.layout.etp + visits) * 8
    copies = (s.u + experts.count) * s.model.hidden * s.exact if s.q != s.exact else 0
    return s.u * experts.count * s.exact + weights + orders + copies


def _grouped_backward(name: str, rows: int, width: int, inner: int, groups: int, fullest: int) -> tuple[Gemm, ...]:
    """Of weights' gradients those of the experts that get one row more stand apart, where the rows do not divide; so does the fullest."""
    alike = groups - (fullest > 0)
    each, more = divmod(rows - fullest, alike) if alike else (0, 0)
    shares = ((alike - more, each), (more, each + 1), (1, fullest))
    weights = (Gemm(f"{name} dw", width * count, inner, share, count) for count, share in shares if count and share)
    return Gemm(f"{name} dx", rows, inner, width, groups, fullest), *weights


@lru_cache(maxsize=512)
def embedding_piece(model: Model, layout: Layout, seq: int) -> Piece:
    """Token (and position) lookup; its weight gradient is scattered row by row.

    Kept: ids, and positions where they are learned; with tensor parallel also the rows on this rank, and which ids have none here.
    """
    s = Shapes(model, layout, seq)
    whole = s.T * model.hidden * s.q
    forward: tuple[Op, ...] = (Elementwise("lookup", 2 * whole), *s.leave())
    gather = s.tp("all_gather", whole) if layout.sp else []
    positions = 0 if model.rope else (s.t if layout.sp else seq // layout.cp)
    saved = 8 * (s.T + positions) + (9 * s.T if layout.tp > 1 else 0)
    rows = -(-model.vocab // layout.tp) * model.hidden * s.q  # its gradient, before that is added to what is kept
    return Piece("embedding", forward, (*gather, Elementwise("lookup", 3 * whole)), saved, rows + whole)


@lru_cache(maxsize=512)
def head_piece(model: Model, layout: Layout, seq: int, tp_rank: int) -> Piece:
    """Final norm, output head and loss. The logits are turned to fp32 (or stay fp64) and kept as a softmax."""
    s = Shapes(model, layout, seq)
    share = -(-model.vocab // layout.tp)
    vocab = min(share, model.vocab - tp_rank * share)
    exact = s.exact
    logits = s.T * vocab
    loss = s.tp("all_reduce", s.T * exact) + s.tp("all_reduce", 2 * s.T * exact)
    head = columns(s, "head", model.hidden, {"weight": vocab})
    forward: tuple[Op, ...] = (s.norm, *head.forward, Elementwise("loss", logits * (s.q + 4 * exact)), *loss)
    backward: tuple[Op, ...] = (Elementwise("loss", logits * (2 * exact + s.q)), *head.backward, s.norm_backward)
    labels = 10 * s.T if layout.tp > 1 else 0  # their rows on this rank, and which count and which have one here
    saved = 2 * s.residual_bytes + s.t * s.statistics * s.exact + logits * exact + labels
    # The loss's backward makes the gradient of the logits in the softmax's precision, on one device that of the log-softmax too, and then
    # as narrow as the logits. That is left when the softmax is gone, and the head makes dx beside it, of tokens that it gathers again.
    passes = logits * (2 * exact if layout.tp == 1 else exact + (s.q if s.q < exact else 0))
    working = max(0, logits * (s.q - exact) + s.columns_working(model.hidden) + s.product_bytes(vocab, model.hidden))
    return Piece("head", forward, backward, saved, working, loss_bytes=passes, ending_bytes=s.norm_ending(2))


def _up_to_last_saved(forward: tuple[Op, ...]) -> tuple[Op, ...]:
    """Recompute runs a layer, or its MLP, again up to the last tensor that backward needs: the input of the last product, or the
    experts' outputs, which their weights multiply.

    The sum after it is not repeated (PyTorch's checkpoint stops early), but that product is: its function hands over what it saves
    when it ends. Where product and sum are one (async tensor parallel), both are.
    """
    last = max(
        i
        for i, op in enumerate(forward)
        if isinstance(op, Gemm | Under) or (isinstance(op, Elementwise) and op.name == "permute")
    )
    return forward[: last + isinstance(forward[last], Gemm | Under)]
