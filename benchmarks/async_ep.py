"""Step time of expert parallel with its all-to-all under the other pass of a pair, beside the same layout without, on four gloo ranks.

    python benchmarks/async_ep.py [--repetitions 15] [--delays 0,50] [--json PATH]

Both sides are Meshwright's and train the same decoder on the same tokens in the same processes, one thread each pass, under
`dp2 pp2x2:dualpipe-v`, one with `ep2:async` and one with `ep2`; a step is forward, backward and gradient reduction, without optimizer.
Before anything is timed, their losses and gradients must agree. Repetitions interleave (A B, B A, A B, ...), so that a slow moment of
the machine falls on both: read the ratios, not the milliseconds. `plain again` puts two engines of `ep2` side by side in the same way:
what the machine alone makes of a ratio.

gloo's threads move bytes on the cores that compute, so on a machine with few of them nothing can be hidden. With a delay of d
milliseconds every all-to-all to and from experts takes so much longer on both sides, asleep: a stand-in for a network that is slow and
has hardware of its own. It shows whether what can be hidden is, not what a network would do.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from meshwright.models.init import initial_value
from meshwright.parallel.apply import Sequences, apply
from meshwright.parallel.collectives import Group
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.ranks import RankPool
from meshwright.spec.model import Experts, Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
from pairs import Paired, Times, interleaved, print_environment, slowest, write
from peers import Side, assert_close, environment

RANKS, SEQ, MICRO_BATCHES = 4, 128, 8
LAYOUT = "dp2 pp2x2:dualpipe-v {} mb1 fp32"
PLAIN, ASYNC = "ep2", "ep2:async"
MODEL = Model(
    name="moe-512x4",
    family="mixtral",
    layers=4,
    hidden=512,
    ffn=1024,
    vocab=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    max_positions=SEQ,
    experts=Experts(count=8, top_k=2, ffn=1024),
    moe_layers=(0, 1, 2, 3),
)


@dataclass
class Result(Paired):
    """`delay`: seconds."""

    mode: str
    delay: float


# --- on each rank -----------------------------------------------------------------------------------------------------


def measure(mode: str, delay: float, repetitions: int) -> Times:
    """This rank's step times of `mode` and of plain ep. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    sides = [side(each) for each in (mode, PLAIN)]
    check_same_work(*sides)
    with delayed(delay):
        return interleaved(*(one.step for one in sides), repetitions)


def side(mode: str) -> Side:
    layout = parse_layout(LAYOUT.format(mode))
    workload = Workload(SEQ, layout.dp * MICRO_BATCHES)
    mesh = build_mesh(layout, MODEL, torch.device("cpu"))
    engine = apply(MODEL, workload, mesh, initial_shard)
    batch = local_batch(mesh["dp"].index)
    return Side(lambda: engine.gradients(batch), lambda: {s.name: g for s, g in engine.state.whole_gradients()})


def initial_shard(shard: Shard) -> torch.Tensor:
    return shard.of(initial_value(MODEL, shard.name, shard.global_shape, seed=0))


def local_batch(replica: int) -> list[Sequences]:
    generator = torch.Generator().manual_seed(replica)
    return [tuple(torch.randint(0, MODEL.vocab, (2, 1, SEQ), generator=generator)) for _ in range(MICRO_BATCHES)]


def check_same_work(mine: Side, plain: Side) -> None:
    losses = torch.stack([one.step().double() for one in (mine, plain)])
    dist.all_reduce(losses)
    assert_close("the loss", losses[0], losses[1])
    expected = plain.gradients()
    for name, gradient in mine.gradients().items():
        assert_close(f"the gradient of {name}", gradient, expected[name])


@contextmanager
def delayed(seconds: float) -> Iterator[None]:
    """Every all-to-all between ranks that share experts takes so much longer."""
    original: Callable[..., None] = Group.all_to_all

    def slow(group: Group, *args: Any, **kwargs: Any) -> None:
        original(group, *args, **kwargs)
        time.sleep(seconds)

    if seconds:
        Group.all_to_all = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        Group.all_to_all = original  # type: ignore[method-assign]


# --- report -----------------------------------------------------------------------------------------------------------


def run_case(pool: RankPool, mode: str, delay: float, repetitions: int) -> Result:
    ranks = pool.run(measure, RANKS, mode, delay, repetitions, timeout=3600.0)
    return Result(mode, delay, **slowest(ranks))


def show(results: list[Result], about: dict[str, str | int]) -> None:
    table = Table(title=f"Step time, {MODEL.name}, {MICRO_BATCHES} micro-batches of {SEQ:,} tokens, fp32")
    for heading in ("case", "delay ms", "ms", "plain ep2 ms", "ratio of medians", "middle half of pairs"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for result in results:
        name = ASYNC if result.mode == ASYNC else f"{PLAIN}, plain again"
        table.add_row(name, f"{result.delay * 1e3:g}", *result.milliseconds, f"{result.ratio:.3f}", result.spread)
    console = Console(width=120)
    console.print(table)
    print_environment(console, about)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, help="pairs of timed steps, at least 2")
    parser.add_argument("--delays", default="0,50", help="milliseconds that an all-to-all takes longer, comma-separated")
    parser.add_argument("--json", type=Path, help="write raw times here")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error(f"a spread needs at least 2 repetitions, got {options.repetitions}")
    try:
        delays = [float(text) / 1e3 for text in options.delays.split(",")]
    except ValueError:
        delays = [-1.0]
    if min(delays) < 0:
        parser.error(f"delays {options.delays}: give milliseconds, such as 0,50")
    about = environment() | {"ranks": RANKS}
    pool = RankPool()
    try:
        results = [run_case(pool, mode, d, options.repetitions) for d in delays for mode in (ASYNC, PLAIN)]
    finally:
        pool.close()
    show(results, about)
    if options.json:
        write(options.json, about, results, model=asdict(MODEL), seq=SEQ)


if __name__ == "__main__":
    main(sys.argv[1:])
