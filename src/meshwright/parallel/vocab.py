"""Vocabulary-parallel embedding and cross-entropy: each rank holds consecutive rows of the vocabulary.

The rows are cut unevenly when the vocabulary does not divide: no padding, so no weights that the model does not have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.parallel.collectives import (
    Group,
    all_reduce_forward_identity_backward,
    reduce_scatter_forward_all_gather_backward,
)

IGNORED = -100


def vocab_start(vocab: int, group: Group) -> int:
    """The first row of this rank; every rank but the last few holds ceil(vocab / size) rows."""
    return min(group.index * -(-vocab // group.size), vocab)


class VocabParallelEmbedding(nn.Module):
    """Looks up the rows that this rank holds; the others contribute zero, and the sum over the group is the embedding."""

    def __init__(self, embedding: nn.Embedding, group: Group, sequence: bool):
        super().__init__()
        self.weight = embedding.weight
        self.group, self.sequence = group, sequence
        self.start = vocab_start(embedding.num_embeddings, group)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Returns x_BLD, or this rank's tokens x_tD with sequence parallel."""
        rows = ids_BL - self.start
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sequence:
            return reduce_scatter_forward_all_gather_backward(x.flatten(0, 1), self.group)
        return all_reduce_forward_identity_backward(x, self.group)


def vocab_parallel_cross_entropy(logits_BLv: Tensor, labels_BL: Tensor, start: int, group: Group) -> Tensor:
    """Sum over tokens of the cross-entropy of logits cut over the vocabulary; label -100 is ignored.

    Communicates two numbers a token and a maximum, never the logits (Shoeybi et al. 2019, section 3).
    """
    return _VocabParallelCrossEntropy.apply(logits_BLv.flatten(0, -2), labels_BL.flatten(), start, group)  # type: ignore[no-any-return]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Tv: Tensor, labels_T: Tensor, start: int, group: Group) -> Tensor:
        logits = logits_Tv.to(torch.promote_types(logits_Tv.dtype, torch.float32))
        top = logits.amax(dim=-1)
        group.all_reduce(top, op=dist.ReduceOp.MAX)
        exp = (logits - top.unsqueeze(-1)).exp_()
        rows = labels_T - start
        here = (rows >= 0) & (rows < logits.shape[-1])
        rows = rows.masked_fill(~here, 0)
        target = (logits.gather(-1, rows.unsqueeze(-1)).squeeze(-1) - top).masked_fill(~here, 0)
        sums = torch.stack((exp.sum(dim=-1), target))
        group.all_reduce(sums)
        counted = labels_T != IGNORED
        exp.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(exp, rows, here & counted, counted)
        ctx.dtype = logits_Tv.dtype
        return ((sums[0].log() - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, rows, here, counted = ctx.saved_tensors
        dlogits = softmax * (grad * counted).unsqueeze(-1)
        dlogits.scatter_add_(-1, rows.unsqueeze(-1), -(grad * here).unsqueeze(-1).to(dlogits.dtype))
        return dlogits.to(ctx.dtype), None, None, None
