"""The pieces of a model on one rank: embedding, layer, head. What each computes, saves and sends for one micro-batch.

A layer is put together from what `parts.py`, `attention.py` and `experts.py` make; what of it runs again is decided here. Symbols as there.
"""

from __future__ import annotations

from functools import lru_cache

from meshwright.cost.attention import attention_core, heads, latent
from meshwright.cost.experts import experts
from meshwright.cost.ops import Elementwise, Gemm, Op, Piece, Under
from meshwright.cost.parts import Part, Shapes, columns, gated_mlp
from meshwright.spec.layout import Layout
from meshwright.spec.model import Experts, Model


@lru_cache(maxsize=512)
def layer_piece(
    model: Model, layout: Layout, seq: int, window: int | None, moe: bool = False, imbalance: float = 1.0
) -> Piece:
    """One transformer layer on one rank; with experts, on the one that holds the fullest, which gets `imbalance` times the mean."""
    s = Shapes(model, layout, seq, imbalance)
    return _layer(s, attention_core(s, window), moe)


def coreless_layer_piece(model: Model, layout: Layout, seq: int, moe: bool = False, imbalance: float = 1.0) -> Piece:
    """A layer without its attention core: with the price of that (`attention_core`) added, what a layer costs. It depends on tokens
    alone, however they are cut into sequences."""
    return _layer(Shapes(model, layout, seq, imbalance), Part((), (), 0), moe)


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
