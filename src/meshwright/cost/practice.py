"""How the software that runs a layout goes about it: which kernels are fused, what hides under what, what is kept in which width.

A Layout says how the work is split; two frameworks that run the same split differ in these things and in nothing else that is
priced here. The default is this package's own engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["flash", "flash2", "flash1", "fused-softmax", "unfused"]
"""flash: scores never reach memory, in kernels written for the accelerator (flash1, flash2: the versions of FlashAttention, written
for the A100). fused-softmax: scores are written out, and one
kernel scales, masks and normalises them. unfused: a kernel for each of those."""

Loss = Literal["chunked", "fused", "parallel", "whole"]
"""chunked: the head's product and the loss together, over so few tokens at a time that their logits take the room of all hidden states
(Liger-Kernel, arXiv 2410.10989). fused: one kernel from logits to their gradient. parallel: Megatron's, over each rank's share of the
vocabulary. whole: PyTorch's own, in fp32, over logits gathered from the tensor-parallel ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    attention: Attention = "flash"
    loss: Loss | None = None
    """None: the engine's own, which is vocab-parallel and keeps its softmax."""
    fused_norms: bool = True
    """One kernel for a norm, not one for each of its operators."""
    fused_activation: bool = False
    """The activation of a gated MLP and its product with the other half are one kernel, which keeps its inputs only."""
    products: str | None = None
    """The precision that the layers' linear products run in, where it is narrower than the layout's ("fp8")."""
    overlaps_tensor: bool = False
    """Tensor-parallel gathers and scatters run in pieces under the products that read or make them, also in forward."""
    overlaps_dx: bool = True
    """The sum of dx over tensor-parallel ranks hides under the weight gradients."""
    overlaps_gradients: bool = True
    """Gradient reduction hides under the last micro-batch's backward."""
    overlaps_gathers: bool = False
    """The gather of updated parameters hides under the next step's first forward."""
    whole_recompute: bool = False
    """Full recompute runs all of a layer again, not only up to the last tensor that backward needs."""
    frozen: bool = False
    """The weights are not trained (adapters are): no weight gradients, no reduction, no optimizer worth counting."""
    gradient_bytes: int | None = None
    """Of an element of a gradient, kept and on the wire. None: the engine's own (fp32 where computation is narrower)."""
    bucket_bytes: int | None = None
    """Of a bucket of gradients on the wire. None: the engine's own, which grow with the data-parallel group."""
    whole_gradients: bool = False
    """ZeRO-1's gradients are summed whole, and in fp32, on every rank that shares the state, instead of being scattered over them."""
    separate_columns: bool = False
    """Gate and up are two linears, each of which sums its own dx over the tensor-parallel ranks."""
    keeps_gathered: bool = False
    """What sequence parallel gathers for linears is kept for backward, not gathered again."""
    packed_qkv: bool = False
    """Queries, keys and values come out of one product, all of whose output stays as long as the values do: the queries and keys that
    rotary positions made are kept beside it, and the angles of each position."""
    waits: bool = False
    """In every layer's forward the host reads from the device (the lengths of packed documents), so that it starts no kernel ahead."""
    fragments: bool = False
    """Blocks that the allocator got back do not all fit what is kept next: PyTorch's, before its segments could grow (2.1)."""
    grouped_products: bool = True
    """One kernel for the products of all experts of a rank, not one for each expert."""
    gathers_experts: bool = False
    """A token's row goes once over the expert-parallel ranks and is gathered among those that share an expert (Megatron's way)."""
    single_ring: bool = False
    """Data-parallel collectives run as one ring, which leaves each node by one network port, not by all of its ports at once."""
    compiled: bool = False
    """A compiler fuses memory-bound operators into their neighbours and launches steps whole."""


OWN = Practice()
"""The package's own engine."""
