"""Writes how far predictions of published training runs are off, by class of run: the error bars that `estimate` shows.

    python benchmarks/residuals.py ROWS.csv

A class is told by `meshwright.spec.residuals.step_class`. Every source weighs the same within a class, however many runs it has; the
bar holds the middle 80 % of that weight. It is of runs that the constants were fitted on: the errors of sources left out of the fit
are a tenth larger (`fit.py --leave-out all`).
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import yaml

import meshwright.spec.catalogue
from fit import measured, timed
from meshwright.spec.residuals import SHARE, step_class
from published import Predictor
from rows import read_run

PATH = Path(meshwright.spec.catalogue.__file__).parent / "residuals.yaml"
LEAST_SOURCES = 3
"""What is common to the runs of one source says little of others: the bar of a class of fewer is widened to those of all."""


def weighted_quantile(values: list[tuple[float, float]], share: float) -> float:
    """`values`: (value, weight)."""
    values = sorted(values)
    wanted, passed = share * sum(weight for _, weight in values), 0.0
    for value, weight in values:
        passed += weight
        if passed >= wanted:
            return value
    return values[-1][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    with args.rows.open(newline="") as file:
        sources = timed(list(csv.DictReader(file)))
    predictor = Predictor()
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source, rows in sources.items():
        for row in rows:
            predicted = predictor.predict(row)["step_time_s"]
            if predicted:
                run = read_run(row)
                nodes = -(-run.layout.world // run.cluster.node.accelerators)
                name = step_class(nodes, run.model.experts is not None)
                ratios[name][source].append(measured(row) / float(predicted))
    bars = {}
    for name, by_source in ratios.items():
        runs = sum(map(len, by_source.values()))
        every = [(ratio, 1 / len(its)) for its in by_source.values() for ratio in its]
        low, high = (weighted_quantile(every, share) for share in ((1 - SHARE) / 2, (1 + SHARE) / 2))
        bars[name] = {"low": round(low, 3), "high": round(high, 3), "runs": runs, "sources": len(by_source)}
        print(f"{name}: {bars[name]}")
    widest = {"low": min(bar["low"] for bar in bars.values()), "high": max(bar["high"] for bar in bars.values())}
    bars = {
        name: bar if bar["sources"] >= LEAST_SOURCES else bar | widest | {"widened": True} for name, bar in bars.items()
    }
    text = yaml.safe_dump(
        {"source": "published training runs, benchmarks/residuals.py", "step_time": bars},
        sort_keys=False,
        default_flow_style=None,
    )
    PATH.write_text("# Measured over predicted seconds of a step. Written by benchmarks/residuals.py.\n" + text)


if __name__ == "__main__":
    main()
