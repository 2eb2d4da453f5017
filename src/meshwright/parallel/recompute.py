"""What backward computes again instead of keeping: whole layers, or parts of them, of all layers or of the first of each chunk.

The attention core, the MLP and whole layers run under PyTorch's checkpoint: forward keeps what goes in, backward runs the part again
up to the last tensor that it needs (Chen et al. 2016, arXiv 1604.06174). Norms and activations, whose outputs are kept by what
reads them, are made again as `parallel/again.py` says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.models.decoder import Decoder, Layer
from meshwright.models.mlp import MLP
from meshwright.models.moe import Experts, MoE
from meshwright.parallel.again import activation_again, norm_again
from meshwright.spec.layout import Layout


def recompute_parts(decoder: Decoder, layout: Layout) -> None:
    """Selective recompute of the parts that `layout` names. Comes before attention is replaced by its parallel forms, so that
    what they send is not sent again.

    The attention core alone: what it saves grows with the square of the length where no fused kernel serves (Korthikanti et
    al. 2022, arXiv 2205.05198, section 5). The MLP: its hidden units are most of what a layer with fused attention saves. Norms and
    the activation: no product is run again for them, so they cost passes over memory only.
    """
    if layout.recompute != "selective":
        return
    for layer in _recomputed_layers(decoder, layout):
        if "core" in layout.recompute_parts:
            _recompute(layer.attention.core, None)
        if "activation" in layout.recompute_parts:
            for mlp in _mlps(layer):
                activation_again(mlp)
        if "norms" in layout.recompute_parts:
            _make_norms_again(layer, with_mlp="mlp" in layout.recompute_parts)
        if "mlp" in layout.recompute_parts:
            _recompute(layer.mlp or layer.moe, layer.moe)


def recompute_layers(decoder: Decoder, layout: Layout) -> None:
    """Full recompute. Comes after all that changes what a layer computes, and before its parameters are gathered around it."""
    if layout.recompute != "full":
        return
    for layer in _recomputed_layers(decoder, layout):
        _recompute(layer, layer.moe)


def _recomputed_layers(decoder: Decoder, layout: Layout) -> list[Layer]:
    """The first of a chunk: they wait longest for their backward."""
    return list(islice(decoder.layers.values(), layout.recompute_layers))  # type: ignore[arg-type]


def _mlps(layer: Layer) -> list[MLP | Experts]:
    if layer.moe is None:
        return [] if layer.mlp is None else [layer.mlp]
    return [layer.moe.experts] if layer.moe.shared is None else [layer.moe.experts, layer.moe.shared]


def _make_norms_again(layer: Layer, *, with_mlp: bool) -> None:
    """Each norm moves into what reads its output: `with_mlp`, the second into the MLP that runs again, which then keeps the norm's
    input; else backward makes the output again."""
    mlp = layer.mlp or layer.moe
    assert mlp is not None, "a layer has either an MLP or experts"
    attention, mlp_norm = layer.attention, layer.mlp_norm
    attention.forward = norm_again(layer.attention_norm.forward, attention.forward)  # type: ignore[method-assign]
    join = _normed if with_mlp else norm_again
    mlp.forward = join(mlp_norm.forward, mlp.forward)  # type: ignore[method-assign]
    layer.attention_norm.forward = mlp_norm.forward = _unchanged  # type: ignore[method-assign]


def _normed(norm: Callable[[Tensor], Tensor], reader: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest: reader(norm(x), *rest)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _recompute(module: nn.Module | None, moe: MoE | None) -> None:
    assert module is not None, "a layer has either an MLP or experts"
    module.forward = _checkpointed(module.forward, moe)  # type: ignore[method-assign, assignment]


def _checkpointed(forward: Callable[..., Tensor], moe: MoE | None) -> Callable[..., Tensor]:
    """`forward` that runs again in backward, where the experts of `moe` do not count their tokens a second time."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if moe is None else moe.not_counting()

    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
