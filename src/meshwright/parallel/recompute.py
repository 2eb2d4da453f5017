"""What backward computes again instead of keeping: whole layers, or parts of them, of all layers or of the first of each chunk.

Each part runs under PyTorch's checkpoint: forward keeps what goes in, backward runs the part again up to the last tensor that it
needs (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.models.decoder import Decoder, Layer
from meshwright.models.moe import MoE
from meshwright.spec.layout import Layout


def recompute_parts(decoder: Decoder, layout: Layout) -> None:
    """Selective recompute of the parts that `layout` names. Comes before attention is replaced by its parallel forms, so that
    what they send is not sent again.

    The attention core alone: what it saves grows with the square of the length where no fused kernel serves (Korthikanti et
    al. 2022, arXiv 2205.05198, section 5). The MLP: its hidden units are most of what a layer with fused attention saves.
    """
    if layout.recompute != "selective":
        return
    for layer in _recomputed_layers(decoder, layout):
        if "core" in layout.recompute_parts:
            _recompute(layer.attention.core, None)
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


def _recompute(module: nn.Module | None, moe: MoE | None) -> None:
    assert module is not None, "a layer has either an MLP or experts"
    module.forward = _checkpointed(module.forward, moe)  # type: ignore[method-assign, assignment]


def _checkpointed(forward: Callable[..., Tensor], moe: MoE | None) -> Callable[..., Tensor]:
    """`forward` that runs again in backward, where the experts of `moe` do not count their tokens a second time."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if moe is None else moe.not_counting()

    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
