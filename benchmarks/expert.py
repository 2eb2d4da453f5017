"""Step time of a MoE layer with its experts on two ranks, beside the same layer in one process.

    python benchmarks/expert.py [--repetitions 15] [--tokens 2048] [--json PATH]

Both sides compute the same tokens in total, one thread a rank. With ep2 each rank brings half of them and holds half of the
experts. In one process they are a single batch; both ranks compute it at once, each for itself, so that either side finds two
cores at work and shares them alike with whatever else runs. A step is forward and backward of the layer. With nothing to send
and an even router the ratio would be 0.5. Before anything is timed, outputs and gradients must agree. Repetitions interleave
(A B, B A, A B, ...), so that a slow moment of the machine falls on both: read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from meshwright.models.init import initial_value
from meshwright.models.moe import MoE
from meshwright.parallel.collectives import Group
from meshwright.parallel.expert import apply_expert_parallel
from meshwright.parallel.ledger import Ledger
from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.ranks import RankPool
from meshwright.spec.model import Experts, Model
from pairs import Paired, Times, interleaved, print_environment, slowest, write
from peers import RANKS, assert_close, environment

NO_TP = Group("tp", (0,), 0, None, Ledger())
TARGET = 0.65
"""The most that ep2 / one process may be."""
MODEL = Model(
    name="moe-512",
    family="mixtral",
    layers=1,
    hidden=512,
    ffn=1024,
    vocab=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    max_positions=4096,
    experts=Experts(count=8, top_k=2, ffn=1024),
    moe_layers=(0,),
)


@dataclass
class Side:
    """`step` returns this rank's part of the layer's output."""

    layer: MoE
    tokens: slice
    step: Callable[[], Tensor]


@dataclass
class Result(Paired):
    tokens: int


# --- on each rank -----------------------------------------------------------------------------------------------------


def measure(tokens: int, repetitions: int) -> Times:
    """This rank's step times of both sides. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    ep = Group("ep", tuple(range(RANKS)), rank, dist.group.WORLD, Ledger())
    alone = Group("ep", (rank,), 0, None, Ledger())
    mine, all_of_them = side(sharded(ep), tokens, ep), side(sharded(alone), tokens, alone)
    check_same_work(mine, all_of_them, ep)
    return interleaved(mine.step, all_of_them.step, repetitions)


def sharded(ep: Group) -> MoE:
    """This rank's share of the layer when the experts are spread over `ep`."""
    layer, gradients = MoE(MODEL), WeightGradients()
    apply_expert_parallel(layer, ep, NO_TP, gradients, etp=1, sequence=False, micro_batch=1)
    for name, parameter in list(layer.named_parameters()):
        value = initial_value(MODEL, f"layers.0.moe.{name}", tuple(parameter.shape), seed=0)
        own = nn.Parameter(value.chunk(ep.size)[ep.index].clone() if name.startswith("experts.") else value)
        path, _, last = name.rpartition(".")
        setattr(layer.get_submodule(path), last, own)
        gradients.keep(own, Slot(own))
    return layer


class Slot:
    """Keeps the gradient of a weight as the engine does: in memory of its own, written by the product itself."""

    def __init__(self, weight: nn.Parameter):
        self.weight, self.view = weight, torch.zeros_like(weight)

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None:
        raise AssertionError("the layer has no weights but the router's and the experts'")

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None:
        for view, grad, x in zip(self.view, grad_nO.split(counts), x_nI.split(counts), strict=True):
            torch.mm(grad.t(), x, out=view)
        self.weight.grad = self.view


def side(layer: MoE, tokens: int, ep: Group) -> Side:
    """The layer's step on this rank's part of the tokens."""
    part = slice(tokens * ep.index // ep.size, tokens * (ep.index + 1) // ep.size)
    x, dy = torch.randn(2, 1, tokens, MODEL.hidden, generator=torch.Generator().manual_seed(0))
    x, dy = x[:, part].clone().requires_grad_(), dy[:, part].clone()

    def step() -> Tensor:
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y.detach()

    return Side(layer, part, step)


def check_same_work(mine: Side, whole: Side, ep: Group) -> None:
    assert_close("the output", mine.step(), whole.step()[:, mine.tokens])
    expected = dict(whole.layer.named_parameters())
    for name, parameter in mine.layer.named_parameters():
        gradient, reference = parameter.grad, expected[name].grad
        if name.startswith("experts."):
            reference = reference.chunk(ep.size)[ep.index]
        else:
            dist.all_reduce(gradient)
        assert_close(f"the gradient of {name}", gradient, reference)


# --- report -----------------------------------------------------------------------------------------------------------


def run(tokens: int, repetitions: int) -> Result:
    pool = RankPool()
    try:
        ranks = pool.run(measure, RANKS, tokens, repetitions, timeout=3600.0)
    finally:
        pool.close()
    return Result(tokens, **slowest(ranks))


def show(result: Result, about: dict[str, str | int]) -> None:
    experts = MODEL.experts
    assert experts is not None
    table = Table(title=f"Step time of a MoE layer, {result.tokens:,} tokens in total, fp32")
    for heading in ("case", "ours ms", "one process ms", "ratio of medians", "middle half of pairs", "at most"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    colour = "green" if result.ratio <= TARGET else "red"
    table.add_row("ep2", *result.milliseconds, f"[{colour}]{result.ratio:.3f}[/]", result.spread, f"{TARGET:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(
        f"hidden {MODEL.hidden}, {experts.count} experts of width {experts.ffn}, {experts.top_k} a token; "
        "a step is forward and backward"
    )
    print_environment(console, about)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, help="pairs of timed steps, at least 2")
    parser.add_argument("--tokens", type=int, default=2048, help="of both ranks together, an even number")
    parser.add_argument("--json", type=Path, help="write raw times here")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error(f"a spread needs at least 2 repetitions, got {options.repetitions}")
    if options.tokens < RANKS or options.tokens % RANKS:
        parser.error(f"both ranks bring equally many tokens: {options.tokens} does not divide by {RANKS}")
    about = environment()
    result = run(options.tokens, options.repetitions)
    show(result, about)
    if options.json:
        write(options.json, about, [result], model=asdict(MODEL))


if __name__ == "__main__":
    main(sys.argv[1:])
