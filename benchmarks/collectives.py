"""Scores the seconds of collectives against published measurements, by accelerator and operation.

    python benchmarks/collectives.py COLLECTIVES.csv [--all]

Rows of one node are scored where nccl-tests measured them (kernels of other libraries are not what the model describes); `--all`
takes every row that states its ranks. The median of what several versions measured is compared: the error that counts is the median
over sizes and numbers of ranks, from 1 MiB up and below apart.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.ops import Collective, CollectiveOp
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.errors import UserError
from rows import Row, read_cluster

OPERATIONS: dict[str, CollectiveOp] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send",
}
LARGE = 2**20
Case = tuple[str, str, int, int, int]
"""Accelerator, operation, ranks, nodes, bytes."""


def measured_seconds(row: Row, ranks: int) -> float | None:
    """From the latency, else from the bus bandwidth by nccl-tests' convention (doc/PERFORMANCE.md)."""
    if row["latency_us"]:
        return float(row["latency_us"]) * 1e-6
    rate = row["busbw_gbytes_s"] or row["calc_busbw_gbytes_s"]
    if not rate or not float(rate):
        return None
    share = (ranks - 1) / ranks
    factor = {"all_reduce": 2 * share, "sendrecv": 1.0}.get(row["op"], share)
    return float(row["message_bytes"]) * factor / (float(rate) * 1e9)


def cases(rows: list[Row], every: bool) -> dict[Case, list[float]]:
    out: dict[Case, list[float]] = defaultdict(list)
    for row in rows:
        if not row["n_gpus"] or row["op"] not in OPERATIONS:
            continue
        ranks, nodes = int(row["n_gpus"]), int(row["n_nodes"] or 1)
        if not every and (nodes > 1 or not row["tool"].startswith("nccl-tests, NCCL")):
            continue
        seconds = measured_seconds(row, ranks)
        if seconds:
            out[row["gpu"], row["op"], ranks, nodes, int(float(row["message_bytes"]))].append(seconds)
    return out


def scored(measured: dict[Case, list[float]]) -> Iterator[tuple[tuple[str, str, bool], float]]:
    """((accelerator, operation, whether large), predicted over measured less one). Accelerators not in the catalogue are left out."""
    for (gpu, op, ranks, nodes, nbytes), seconds in measured.items():
        per_node = str(ranks // nodes) if nodes > 1 else ""
        try:
            times = CollectiveTimes(read_cluster({"gpu": gpu, "gpus_per_node": per_node}), load_collective_constants())
        except UserError:
            continue
        guess = times.seconds(Collective("dp", OPERATIONS[op], ranks, 1, nbytes))
        yield (gpu, op, nbytes >= LARGE), guess / statistics.median(seconds) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    with args.rows.open(newline="") as file:
        measured = cases(list(csv.DictReader(file)), args.all)
    errors: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for key, error in scored(measured):
        errors[key].append(abs(error))
    print(f"{'accelerator':16} {'operation':15} {'below 1 MiB':>12} {'from 1 MiB':>12}")
    for gpu, op in sorted({key[:2] for key in errors}):
        shown = [
            f"{statistics.median(e):.0%} of {len(e)}" if (e := errors.get((gpu, op, large))) else "-"
            for large in (False, True)
        ]
        print(f"{gpu[:16]:16} {op:15} {shown[0]:>12} {shown[1]:>12}")


if __name__ == "__main__":
    main()
