"""Predicts the step time, and whether memory suffices, of published training runs.

    python benchmarks/published.py ROWS.csv PREDICTIONS.csv

Every row is priced from its own columns (`rows.py` reads them) with one set of constants, those of the catalogue. The predictions
have the columns id, step_time_s, fits and reason; a row that cannot be priced has its reason and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Price
from meshwright.spec.errors import UserError
from meshwright.spec.kernels import KernelConstants
from rows import Row, Run, read_run

CLEARLY_OVER = 1.3
"""Of the memory: more than an estimate of activations can be wrong by."""
COLUMNS = ("id", "step_time_s", "fits", "reason")


class Predictor:
    """Prices rows; those that share model, machine, workload and practice share an estimator."""

    def __init__(self, constants: KernelConstants | None = None) -> None:
        self._constants = constants
        self._estimators: dict[object, Estimator] = {}

    def predict(self, row: Row) -> dict[str, str]:
        try:
            run = read_run(row)
            price = self._price(run)
        except (UserError, ArithmeticError, ValueError) as error:
            return {"id": row.get("id", ""), "step_time_s": "", "fits": "", "reason": str(error)}
        return {
            "id": row.get("id", ""),
            "step_time_s": f"{price.step_time_s:.6g}",
            "fits": "yes" if price.fits else "no",
            "reason": "",
        }

    def _price(self, run: Run) -> Price:
        key = (run.cluster.model_dump_json(), run.model, run.workload, run.practice)
        if key not in self._estimators:
            self._estimators[key] = Estimator(run.model, run.cluster, run.workload, run.practice, self._constants)
        estimator = self._estimators[key]
        estimator.check(run.layout)
        price = estimator.played(run.layout)
        if run.may_recompute and price.peak_bytes > CLEARLY_OVER * run.cluster.accelerator.memory_bytes:
            # The row does not say what is recomputed, and without it would not have run.
            price = estimator.played(replace(run.layout, recompute="full"))
        return price


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("predictions", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    predictor = Predictor()
    with args.rows.open(newline="") as file:
        predictions = [predictor.predict(row) for row in csv.DictReader(file)]
    with args.predictions.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(predictions)
    skipped = Counter(p["reason"] for p in predictions if p["reason"])
    print(f"{len(predictions) - sum(skipped.values())} of {len(predictions)} rows in {time.perf_counter() - began:.0f} s")
    for reason, count in skipped.most_common():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
