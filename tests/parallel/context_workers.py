"""What ranks do in the tests of context parallel: attention on their tokens, forward and backward. Imported by the rank processes.

Shape suffixes as in parallel/context.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.models.attention import AttentionCore
from meshwright.parallel.collectives import Group
from meshwright.parallel.context import ContextParallelCore, cut_tokens, cut_where
from meshwright.parallel.ledger import Ledger
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout


@dataclass(frozen=True)
class Case:
    """One layer's attention over `batch` sequences, `documents` of which start at the given positions of every sequence but the
    first, which is one document."""

    layout: Layout
    heads: int = 4
    kv_heads: int = 2
    seq: int = 48
    batch: int = 2
    width: int = 8
    value_width: int = 8
    window: int | None = None
    documents: tuple[int, ...] = ()
    sinks: bool = False
    dtype: torch.dtype = torch.float64


class Outcome(NamedTuple):
    y: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v, dy of whole sequences as [B, S, heads, width] (a projection's memory order), sinks_H, documents_BS."""
    generator = torch.Generator().manual_seed(11)
    shapes = (
        (case.heads, case.width),
        (case.kv_heads, case.width),
        (case.kv_heads, case.value_width),
        (case.heads, case.value_width),
    )
    q, k, v, dy = (
        torch.randn(case.batch, case.seq, *shape, generator=generator, dtype=torch.float64).to(case.dtype)
        for shape in shapes
    )
    sinks = torch.randn(case.heads, generator=generator, dtype=torch.float64).to(case.dtype) if case.sinks else None
    documents = None
    if case.documents:
        starts = torch.tensor(case.documents)
        documents = (torch.arange(case.seq).unsqueeze(-1) >= starts).sum(dim=-1).repeat(case.batch, 1)
        documents[0] = 0
    return q, k, v, dy, sinks, documents


def attend_to_my_tokens(case: Case) -> tuple[Outcome, list[tuple[str, int, int, int]]]:
    """This rank's part of the result, and what it sent: (op, group size, calls, bytes)."""
    layout, index, ledger = case.layout, dist.get_rank(), Ledger()
    ring, ulysses = context_groups(layout, ledger)
    *whole, sinks, documents = inputs(case)
    q, k, v, dy = (cut_tokens(x, layout, index).transpose(1, 2) for x in whole)
    wanted = [x.requires_grad_() for x in (q, k, v)] + ([] if sinks is None else [sinks.requires_grad_()])
    core = ContextParallelCore(AttentionCore(case.window, scale=0.4), ring, ulysses)
    y = core(q, k, v, cut_where(documents, case.seq, layout, index, q.device), sinks)
    gradients = torch.autograd.grad(y, wanted, dy)
    sent = [(entry.op, entry.group_size, calls, nbytes) for entry, calls, nbytes in ledger.rows() if entry.axis == "cp"]
    return Outcome(y.detach(), *gradients, *([None] if sinks is None else [])), sent


def context_groups(layout: Layout, ledger: Ledger) -> tuple[Group, Group]:
    """Ring and ulysses. Every rank makes every group, in one order."""
    grid, rank = Grid(layout), dist.get_rank()
    all_ranks, u = tuple(range(layout.cp)), layout.cp_ulysses
    rings = [grid.across(all_ranks, i, u) for i in range(u)]
    blocks = [grid.block(all_ranks, i, u) for i in range(0, layout.cp, u)]
    groups = []
    for family in (rings, blocks):
        for ranks in family:
            handle = dist.new_group(list(ranks)) if len(ranks) > 1 else None
            if rank in ranks:
                groups.append(Group("cp", ranks, ranks.index(rank), handle, ledger))
    return groups[0], groups[1]


def in_one_process(case: Case) -> Outcome:
    """Softmax over a row of scores and the sink, written out in fp64."""
    *whole, sinks, documents = inputs(case)
    q, k, v, dy = (x.double().transpose(1, 2) for x in whole)
    sinks = None if sinks is None else sinks.double()
    wanted = [x.requires_grad_() for x in (q, k, v)] + ([] if sinks is None else [sinks.requires_grad_()])
    k_each, v_each = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    distance = torch.arange(case.seq).unsqueeze(-1) - torch.arange(case.seq)
    hidden = (distance < 0) | (distance >= (case.window or case.seq))
    if documents is not None:
        hidden = hidden | (documents.unsqueeze(-1) != documents.unsqueeze(-2)).unsqueeze(1)
    weights = (q @ k_each.mT * 0.4).masked_fill(hidden, float("-inf")).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    y = weights / total @ v_each
    gradients = torch.autograd.grad(y, wanted, dy)
    return Outcome(y.detach(), *gradients, *([None] if sinks is None else []))
