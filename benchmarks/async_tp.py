"""Step time of async tensor parallel beside plain sequence parallel, both Meshwright's, on this machine with gloo ranks.

    python benchmarks/async_tp.py [--repetitions 15] [--degrees 2,4] [--json PATH]

Both sides train the decoder of `benchmarks/peers.py` on the same tokens in the same processes, one thread each; a step is forward,
backward and gradient reduction, without optimizer. Before anything is timed, their losses and gradients must agree.
Repetitions interleave (A B, B A, A B, ...), so that a slow moment of the machine falls on both: read the ratios, not the
milliseconds. `plain again` puts two engines of `:sp` side by side in the same way: what the machine alone makes of a ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from meshwright.parallel.ranks import RankPool
from peers import MODEL, SEQ, WARM_UP, Batch, Case, Side, assert_close, environment, local_batch, ours, timed


@dataclass
class Result:
    """Step times in seconds, of the slowest rank; entry i of both was measured side by side."""

    tp: int
    mode: str
    times: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.times) / statistics.median(self.plain)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the ratios of the pairs."""
        low, _, high = statistics.quantiles([a / b for a, b in zip(self.times, self.plain, strict=True)], n=4)
        return low, high


def measure(tp: int, mode: str, repetitions: int) -> tuple[list[float], list[float]]:
    """This rank's step times of `mode` and of plain `sp`. Raises AssertionError unless both compute the same."""
    torch.set_num_threads(1)
    cases = [Case(each, f"tp{tp}:{each} mb1 fp32", 1, "", 1.0) for each in (mode, "sp")]
    batch: Batch = local_batch(cases[0])
    sides = [ours(case, batch)[0] for case in cases]
    check_same_work(*sides)
    times: list[list[float]] = [[], []]
    for i in range(-WARM_UP, repetitions):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            seconds = timed(sides[which].step)
            if i >= 0:
                times[which].append(seconds)
    return times[0], times[1]


def check_same_work(mine: Side, plain: Side) -> None:
    assert_close("the loss", mine.step(), plain.step())
    expected = plain.gradients()
    for name, gradient in mine.gradients().items():
        assert_close(f"the gradient of {name}", gradient, expected[name])


def run_case(pool: RankPool, tp: int, mode: str, repetitions: int) -> Result:
    ranks = pool.run(measure, tp, tp, mode, repetitions, timeout=3600.0)
    mine, plain = ([max(times) for times in zip(*side, strict=True)] for side in zip(*ranks, strict=True))
    return Result(tp, mode, mine, plain)


def show(results: list[Result], about: dict[str, str | int]) -> None:
    table = Table(title=f"Step time, {MODEL.name}, {SEQ:,} tokens, fp32")
    for heading in ("case", "ms", "plain sp ms", "ratio of medians", "middle half of pairs"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for result in results:
        low, high = result.quartiles
        milliseconds = [f"{statistics.median(times) * 1e3:.0f}" for times in (result.times, result.plain)]
        name = f"tp{result.tp}:async" if result.mode == "async" else f"tp{result.tp}:sp, plain again"
        table.add_row(name, *milliseconds, f"{result.ratio:.3f}", f"{low:.3f} to {high:.3f}")
    console = Console(width=120)
    console.print(table)
    console.print("; ".join(f"{key} {value}" for key, value in about.items()), highlight=False)


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
        rows = [asdict(result) | {"ratio": result.ratio, "quartiles": result.quartiles} for result in results]
        options.json.write_text(
            json.dumps({"environment": about, "model": asdict(MODEL), "seq": SEQ, "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
