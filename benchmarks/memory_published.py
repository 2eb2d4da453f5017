"""Memory of published runs beside what `estimate` says of them.

    python benchmarks/memory_published.py ROWS.csv [--rows]

Every row is priced from its own columns (`rows.py` reads them) with the constants of the catalogue. What a figure counts depends on who
counted it: a driver (nvidia-smi) sees all that a process has, PyTorch's counters see tensors alone (allocated) or what its allocator keeps
(reserved). To the first the overhead of the cost model belongs, to the others it does not. Where a row does not say who counted, it is
taken for allocated: that is what training logs print.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.cost.estimate import Estimator
from meshwright.cost.memory import state_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.spec.errors import UserError
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.workload import Workload
from rows import Row, Run, read_layout, read_model, read_run

GIB = 2**30
WIDE_SUM = 4
"""Bytes of an element of gradients that are added up in fp32 beside the narrow ones of the backward."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A row's figure beside the estimate's, in bytes."""

    row: Row
    counted: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def counted(row: Row) -> str:
    """Who counted: driver, reserved, allocated, or weights, where nothing but these is there yet."""
    kind = (row.get("mem_kind") or "").lower()
    if "after loading" in kind:
        return "weights"
    if "device" in kind or "nvidia-smi" in kind:
        return "driver"
    return "reserved" if "reserved" in kind else "allocated"


def score(row: Row) -> Scored:
    """Raises UserError with what is missing or cannot be priced."""
    try:
        measured = float(row.get("mem_gib_per_gpu") or "") * GIB
    except ValueError:
        raise UserError(f"mem_gib_per_gpu is {row.get('mem_gib_per_gpu')!r}, not a number") from None
    kind = counted(row)
    return Scored(row, kind, measured, weight_bytes(row) if kind == "weights" else peak_bytes(read_run(row), kind, row))


def weight_bytes(row: Row) -> float:
    model = read_model(row)
    layout = read_layout(row, model)
    return state_bytes(rank_program(model, layout, Workload(1, 1), Place()), layout)["parameters"]


def peak_bytes(run: Run, kind: str, row: Row) -> float:
    """Of the fullest stage."""
    flags = (row.get("other_flags") or "").lower()
    layout, practice = run.layout, run.practice
    if "offload" in flags:
        layout = replace(layout, offload="optimizer")
    if "fp32 grad acc" in flags:
        practice = replace(practice, gradient_bytes=WIDE_SUM + STATE_BYTES[layout.precision].parameter)
    estimator = Estimator(run.model, run.cluster, run.workload, practice)
    estimator.check(layout)
    peak = estimator.played(layout).peak_bytes
    return peak if kind == "driver" else peak - estimator.overhead


def table(scored: Sequence[Scored]) -> list[tuple[str, ...]]:
    """By source and who counted: rows, median error, median of its size, the worst."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in scored:
        groups[one.row.get("source") or "", one.counted].append(one.error)
    return [
        (
            *key,
            str(len(errors)),
            f"{statistics.median(errors):+.1%}",
            f"{statistics.median(map(abs, errors)):.1%}",
            f"{max(errors, key=abs):+.1%}",
        )
        for key, errors in sorted(groups.items(), key=lambda pair: -len(pair[1]))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rows", dest="each", action="store_true", help="Print every row, too.")
    args = parser.parse_args()
    scored, skipped = [], Counter[str]()
    with args.rows.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                scored.append(score(row))
            except (UserError, ArithmeticError, ValueError) as error:
                skipped[str(error)] += 1
    if args.each:
        for one in scored:
            figures = f"{one.measured / GIB:6.1f} {one.predicted / GIB:6.1f} GiB {one.error:+7.1%}"
            print(f"{one.row.get('id', ''):22} {figures}  {one.row.get('model_name')}")
    print("| source | counted | rows | bias | median error | worst |\n|---|---|---|---|---|---|")
    for cells in table(scored):
        print(f"| {' | '.join(cells)} |")
    print(f"{len(scored)} of {len(scored) + sum(skipped.values())} rows")
    for reason, count in skipped.most_common():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
