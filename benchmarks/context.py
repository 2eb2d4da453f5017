"""Attention over one sequence held by four ranks, by a ring and by Ulysses, beside an all-gather of keys and values.

    python benchmarks/context.py [--repetitions 15] [--seq 4096] [--json PATH]

The other side gathers the keys and values of all ranks into one tensor, puts them in order, and attends to them with PyTorch's
scaled_dot_product_attention and a mask; in backward their gradients are reduce-scattered (Llama 3, arXiv 2407.21783, section
3.3.2). It gets every help: it holds the same balanced pieces as a ring rank, it computes no key after the end of a piece, its
masks are made before the clock starts, and its collectives are those of Meshwright, whose reduce-scatter on gloo is faster than
gloo's own. A step is forward and backward. Before anything is timed, outputs and gradients must agree.
Repetitions interleave (A B, B A, A B, ...), so that a slow moment of the machine falls on both: read the ratios, not the
milliseconds. Ulysses ranks hold other tokens than ring ranks, so for them the outputs are compared in order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from meshwright.models.attention import AttentionCore, visible
from meshwright.parallel.collectives import Group, all_gather_forward_reduce_scatter_backward
from meshwright.parallel.context import ContextParallelCore, cut_tokens, cut_where
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.ranks import RankPool
from meshwright.parallel.ring import cut, positions_of
from meshwright.spec.context import context_slices, sequence_unit
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from pairs import Paired, Times, interleaved, print_environment, slowest, write
from peers import assert_close, environment

RANKS = 4
LAYOUTS = ("cp4:ring fp32", "cp4:ulysses fp32", "cp4:ring2xulysses2 fp32")
MODEL = Model(
    name="attention-8x64",
    family="llama",
    layers=1,
    hidden=512,
    ffn=512,
    vocab=512,
    heads=8,
    kv_heads=4,
    head_dim=64,
    max_positions=65536,
)
CPU = torch.device("cpu")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q_1HLC, k_1KLC, v_1KLC of a rank's tokens to y_1HLC."""


@dataclass
class Side:
    """`step` returns the output and the gradients of q, k and v, each [1, heads, tokens of this rank, head dim]."""

    layout: Layout
    step: Callable[[], list[Tensor]]


@dataclass
class Result(Paired):
    layout: str
    seq: int


# --- the two sides ----------------------------------------------------------------------------------------------------


def ours(layout: Layout, seq: int) -> Side:
    mesh = build_mesh(layout, MODEL, CPU)
    core = ContextParallelCore(AttentionCore(None), mesh["ring"], mesh["ulysses"])
    where = cut_where(None, seq, layout, mesh["cp"].index, CPU)
    return side(layout, seq, lambda q, k, v: core(q, k, v, where))


def all_gather_peer(seq: int) -> Side:
    layout = Layout(cp=RANKS, precision="fp32")
    group = build_mesh(layout, MODEL, CPU)["cp"]
    in_rank_order = torch.cat([positions_of(context_slices(seq, RANKS, 1, i), CPU) for i in range(RANKS)])
    order, pieces = in_rank_order.argsort(), pieces_of(seq, group)

    def attend(q_1HLC: Tensor, k_1KLC: Tensor, v_1KLC: Tensor) -> Tensor:
        kv_L2KC = torch.stack((k_1KLC[0], v_1KLC[0])).permute(2, 0, 1, 3)
        kv_S2KC = all_gather_forward_reduce_scatter_backward(kv_L2KC, group)[order]
        k_1KSC, v_1KSC = kv_S2KC.permute(1, 2, 0, 3).unsqueeze(1)
        parts = [
            F.scaled_dot_product_attention(
                q_1HLC[:, :, rows], k_1KSC[:, :, :end], v_1KSC[:, :, :end], attn_mask=mask, enable_gqa=True
            )
            for rows, end, mask in pieces
        ]
        return torch.cat(parts, dim=2)

    return side(layout, seq, attend)


def pieces_of(seq: int, group: Group) -> list[tuple[slice, int, Tensor]]:
    """Of each consecutive piece that this rank holds: its rows, the end of the keys that it sees, and its mask."""
    out, before = [], 0
    for piece in context_slices(seq, RANKS, 1, group.index):
        seen = visible(positions_of((piece,), CPU), torch.arange(piece.stop), None)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        out.append((cut(range(before, before + len(piece))), piece.stop, mask))
        before += len(piece)
    return out


def side(layout: Layout, seq: int, attend: Attend) -> Side:
    """Forward and backward of this rank's tokens, which lie in memory as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    heads = (MODEL.heads, MODEL.kv_heads, MODEL.kv_heads, MODEL.heads)
    whole = [torch.randn(1, seq, n, MODEL.head_dim, generator=generator) for n in heads]
    q, k, v, dy = (cut_tokens(x, layout, dist.get_rank()).transpose(1, 2) for x in whole)
    wanted = [x.requires_grad_() for x in (q, k, v)]

    def step() -> list[Tensor]:
        y = attend(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return Side(layout, step)


# --- on each rank -----------------------------------------------------------------------------------------------------


def measure(layout: str, seq: int, repetitions: int) -> Times:
    """This rank's step times of both sides. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    sides = (ours(parse_layout(layout), seq), all_gather_peer(seq))
    for what, mine, theirs in zip(("y", "dq", "dk", "dv"), *(in_order(each, seq) for each in sides), strict=True):
        assert_close(what, mine, theirs)
    return interleaved(*(one.step for one in sides), repetitions)


def in_order(one: Side, seq: int) -> list[Tensor]:
    """The result of a step on all ranks, by position."""
    layout = one.layout
    held = torch.cat([cut_tokens(torch.arange(seq).unsqueeze(0), layout, i)[0] for i in range(RANKS)])
    out = []
    for x_1HLC in one.step():
        parts = [torch.empty_like(x_1HLC, memory_format=torch.contiguous_format) for _ in range(RANKS)]
        dist.all_gather(parts, x_1HLC.contiguous())
        out.append(torch.cat(parts, dim=2)[:, :, held.argsort()])
    return out


# --- report -----------------------------------------------------------------------------------------------------------


def run_case(pool: RankPool, layout: str, seq: int, repetitions: int) -> Result:
    ranks = pool.run(measure, RANKS, layout, seq, repetitions, timeout=3600.0)
    return Result(layout, seq, **slowest(ranks))


def show(results: list[Result], about: dict[str, str | int]) -> None:
    table = Table(title=f"Step time of attention, {results[0].seq:,} tokens over {RANKS} ranks, fp32")
    for heading in ("layout", "ours ms", "all-gather ms", "ratio of medians", "middle half of pairs"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for result in results:
        table.add_row(result.layout, *result.milliseconds, f"{result.ratio:.3f}", result.spread)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{MODEL.heads} heads, {MODEL.kv_heads} key-value heads of {MODEL.head_dim} dims; a step is forward and backward"
    )
    print_environment(console, about)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, help="pairs of timed steps, at least 2")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of the sequence")
    parser.add_argument("--json", type=Path, help="write raw times here")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error(f"a spread needs at least 2 repetitions, got {options.repetitions}")
    if options.seq < 1 or options.seq % sequence_unit(RANKS, 1):
        parser.error(f"four ring ranks need a multiple of {sequence_unit(RANKS, 1)} tokens, got {options.seq}")
    about = environment() | {"ranks": RANKS}
    pool = RankPool()
    try:
        results = [run_case(pool, layout, options.seq, options.repetitions) for layout in LAYOUTS]
    finally:
        pool.close()
    show(results, about)
    if options.json:
        write(options.json, about, results, model=asdict(MODEL))


if __name__ == "__main__":
    main(sys.argv[1:])
