"""Fits the constants of kernels on published runs, and says how far they carry: each source is left out once.

    python benchmarks/fit.py ROWS.csv [--leave-out SOURCE ...] [--per-source N]

The constants are one set for all models, accelerators and sources. Each starts from a published or plausible figure (START) and is
moved up and down while that lowers the objective: the mean over sources of the median error, plus a part of the mean error, so that
a class of rows that is far off counts too. With `--leave-out` the rows whose source contains SOURCE take no part in the fit, and
their error under what the others gave is printed: "all" does that for every source in turn.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from meshwright.spec.kernels import KernelConstants, load_kernel_constants
from published import Predictor
from rows import Row

START = {
    "sustained_share": 0.9,
    "passes": 1.5,
    "tile_fill": 128.0,
    "attention.flash.forward": 0.9,
    "attention.flash.backward": 0.7,
    "attention.flash1.forward": 0.5,
    "attention.flash1.backward": 0.42,
    "attention.flash1.newer": 0.6,
    "attention_fill": 256.0,
    "score_passes.fused-softmax": 4.0,
    "score_passes.unfused": 12.0,
    "norm_passes": 16.0,
    "gap": 2e-6,
    "beside": 0.15,
    "dispatch": 20e-6,
    "checkpoint": 1e-3,
}
"""attention, sustained_share: NVIDIA's and FlashAttention's own figures; tile_fill: half a kernel's tile depth of 256; the rest are
orders of magnitude."""
LEAST = {"passes": 1.0, "norm_passes": 1.0}
MOST = {"sustained_share": 1.0, "attention.flash.forward": 1.0, "attention.flash.backward": 1.0, "beside": 1.0}
TAIL = 0.4
"""Weight of the mean error beside the median."""
CLIP = 0.6
"""A single row counts as at most so wrong in the mean."""
STEPS = (0.2, 0.1)
"""Relative changes tried, coarse before fine."""
PER_SOURCE = 110
"""Rows of a source that take part in the fit, evenly spaced: each source weighs the same however many it has."""


def timed(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The complete, timed rows of good quality, by source."""
    out: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        good = row["complete"] == "yes" and row["status"] == "ok" and row["quality"][:1] in ("A", "B")
        if good and measured(row):
            out[row["source"]].append(row)
    return dict(out)


def measured(row: Row) -> float:
    return float(row["step_time_s"] or row["calc_step_time_s"] or 0)


def errors(rows: Sequence[Row], constants: KernelConstants) -> list[float]:
    """Predicted over measured seconds, less one."""
    predictor = Predictor(constants)
    predictions = [(predictor.predict(row)["step_time_s"], measured(row)) for row in rows]
    return [float(seconds) / truth - 1 for seconds, truth in predictions if seconds]


def objective(sources: dict[str, list[Row]], constants: KernelConstants) -> float:
    out = []
    for rows in sources.values():
        off = [abs(e) for e in errors(rows, constants)]
        out.append(statistics.median(off) + TAIL * statistics.fmean(min(e, CLIP) for e in off))
    return statistics.fmean(out)


def fit(sources: dict[str, list[Row]], constants: KernelConstants) -> KernelConstants:
    """Coordinate descent: one constant at a time, as long as a step lowers the objective."""
    best = objective(sources, constants)
    for step in STEPS:
        for name in START:
            for factor in (1 + step, 1 / (1 + step)):
                while (moved := _moved(constants, name, factor)) != constants:
                    found = objective(sources, moved)
                    if found >= best - 1e-5:
                        break
                    best, constants = found, moved
    return constants


def _moved(constants: KernelConstants, name: str, factor: float) -> KernelConstants:
    value = min(max(get(constants, name) * factor, LEAST.get(name, 0.0)), MOST.get(name, float("inf")))
    return put(constants, name, value)


def get(constants: KernelConstants, name: str) -> float:
    first, *rest = name.split(".")
    value = getattr(constants, first)
    if rest:
        value = value[rest[0]]
    return getattr(value, rest[1]) if len(rest) > 1 else value


def put(constants: KernelConstants, name: str, value: float) -> KernelConstants:
    first, *rest = name.split(".")
    if not rest:
        return constants.model_copy(update={first: value})
    table = dict(getattr(constants, first))
    table[rest[0]] = table[rest[0]].model_copy(update={rest[1]: value}) if len(rest) > 1 else value
    return constants.model_copy(update={first: table})


def start() -> KernelConstants:
    constants = load_kernel_constants()
    for name, value in START.items():
        constants = put(constants, name, value)
    return constants


def thinned(rows: list[Row], most: int) -> list[Row]:
    return rows[:: -(-len(rows) // most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="SOURCE")
    parser.add_argument(
        "--per-source", type=int, default=PER_SOURCE, help="rows of a source that take part (default %(default)s)"
    )
    args = parser.parse_args()
    with args.rows.open(newline="") as file:
        sources = timed(list(csv.DictReader(file)))
    left_out = list(sources) if args.leave_out == ["all"] else args.leave_out
    for text in left_out:
        rest = {name: thinned(rows, args.per_source) for name, rows in sources.items() if text not in name}
        constants = fit(rest, start())
        for name in set(sources) - set(rest):
            off = [abs(e) for e in errors(sources[name], constants)]
            print(f"{name}: left out, median error {statistics.median(off):.1%} of {len(off)} rows", flush=True)
    if not left_out:
        constants = fit({name: thinned(rows, args.per_source) for name, rows in sources.items()}, start())
        for name in START:
            print(f"{name}: {get(constants, name):.3g}")
        for source, rows in sources.items():
            print(f"{source}: median error {statistics.median(abs(e) for e in errors(rows, constants)):.1%}")


if __name__ == "__main__":
    main()
