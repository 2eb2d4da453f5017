"""Step time of async tensor parallel beside plain sequence parallel, both Meshwright's, on this machine with gloo ranks.

    python benchmarks/async_tp.py [--repetitions 15] [--degrees 2,4] [--json PATH]

Both sides train the decoder of `benchmarks/peers.py` on the same tokens in the same processes, one thread each; a step is forward,
backward and gradient reduction, without optimizer. Before anything is timed, their losses and gradients must agree.
Repetitions interleave (A B, B A, A B, ...), so that a slow moment of the machine falls on both: read the ratios, not the
milliseconds. `plain again` puts two engines of `:sp` side by side in the same way: what the machine alone makes of a ratio.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from meshwright.parallel.ranks import RankPool
from pairs import Paired, Times, interleaved, print_environment, slowest, write
from peers import MODEL, SEQ, Batch, Case, Side, assert_close, environment, local_batch, ours


@dataclass
class Result(Paired):
    tp: int
    mode: str


def measure(tp: int, mode: str, repetitions: int) -> Times:
    """This rank's step times of `mode` and of plain `sp`. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    cases = [Case(each, f"tp{tp}:{each} mb1 fp32", 1, "", 1.0) for each in (mode, "sp")]
    batch: Batch = local_batch(cases[0])
    sides = [ours(case, batch)[0] for case in cases]
    check_same_work(*sides)
    return interleaved(*(one.step for one in sides), repetitions)


def check_same_work(mine: Side, plain: Side) -> None:
    assert_close("the loss", mine.step(), plain.step())
    expected = plain.gradients()
    for name, gradient in mine.gradients().items():
        assert_close(f"the gradient of {name}", gradient, expected[name])


def run_case(pool: RankPool, tp: int, mode: str, repetitions: int) -> Result:
    ranks = pool.run(measure, tp, tp, mode, repetitions, timeout=3600.0)
    return Result(tp, mode, **slowest(ranks))


def show(results: list[Result], about: dict[str, str | int]) -> None:
    table = Table(title=f"Step time, {MODEL.name}, {SEQ:,} tokens, fp32")
    for heading in ("case", "ms", "plain sp ms", "ratio of medians", "middle half of pairs"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for result in results:
        name = f"tp{result.tp}:async" if result.mode == "async" else f"tp{result.tp}:sp, plain again"
        table.add_row(name, *result.milliseconds, f"{result.ratio:.3f}", result.spread)
    console = Console(width=120)
    console.print(table)
    print_environment(console, about)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, help="pairs of timed steps, at least 2")
    parser.add_argument("--degrees", default="2,4", help="of tensor parallel, comma-separated: 2, 4")
    parser.add_argument("--json", type=Path, help="write raw times here")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error(f"a spread needs at least 2 repetitions, got {options.repetitions}")
    if set(options.degrees.split(",")) - {"2", "4"}:
        parser.error(f"degrees {options.degrees}: legal: 2, 4")
    degrees = [int(tp) for tp in options.degrees.split(",")]
    about = environment() | {"ranks": options.degrees}
    pool = RankPool()
    try:
        results = [run_case(pool, tp, mode, options.repetitions) for tp in degrees for mode in ("async", "sp")]
    finally:
        pool.close()
    show(results, about)
    if options.json:
        write(options.json, about, results, model=asdict(MODEL), seq=SEQ)


if __name__ == "__main__":
    main(sys.argv[1:])
