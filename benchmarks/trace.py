"""The estimate beside a dry run of the engine, for random legal layouts of the catalogue's models at their real size.

    python -m benchmarks.trace [--count 200] [--seed 0] [--json PATH] [--markdown PATH]

Of every layout one stage of each kind is run, and the one of each kind that should hold most. Every line of the program is compared:
calls and bytes of every collective, state, saved bytes, products and attention; and the peak of the fullest stage. Results are added
to the JSON file, one layout a line, as they come, and what was traced is not traced again: delete the file after a change of the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawn import Case, case

from meshwright.spec.huggingface import load_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload
from meshwright.trace.check import Check, check_stage, estimated_peak
from meshwright.trace.engine import trace_ranks
from meshwright.trace.step import RUN

RUNS = RUN + 1
"""Micro-batches that a dry run runs one by one: the first few and the last."""
LIMIT = 0.03
"""The peak is to be within."""
GIB = 2**30

Result = dict[str, Any]


def compare(one: Case) -> Result:
    start = time.monotonic()
    traced = trace_ranks(one.model, one.layout, one.workload, one.ranks)
    checks = [check_stage(stage, one.model, one.layout, one.workload) for stage in traced]
    return {
        "model": one.name,
        "layout": str(one.layout),
        "seq": one.workload.seq,
        "global_batch": one.workload.global_batch,
        "ranks": one.ranks,
        "stages": [_stage(check, stage.peak.section) for check, stage in zip(checks, traced, strict=True)],
        "seconds": round(time.monotonic() - start, 1),
    }


def _stage(check: Check, section: str) -> Result:
    return {
        "stage": check.stage,
        "lines": Counter(line.what.split(" of chunk")[0] for line in check.lines),
        "different": [[line.what, line.name, line.unit, line.traced, line.estimated] for line in check.differences],
        "traced": check.peak_bytes,
        "estimated": check.estimated_peak_bytes,
        "at": section,
    }


def estimated_again(result: Result) -> Result:
    """With today's estimate of the peaks: what was traced stays true while the cost model changes."""
    model, layout, stages = load_model(result["model"]), parse_layout(result["layout"]), []
    workload = Workload(result["seq"], result["global_batch"])
    for rank, stage in zip(result["ranks"], result["stages"], strict=True):
        stages.append(stage | {"estimated": estimated_peak(rank, model, layout, workload)})
    return result | {"stages": stages}


def fullest(result: Result) -> Result:
    return max(result["stages"], key=lambda stage: stage["traced"])  # type: ignore[no-any-return]


def error(result: Result) -> float:
    """Of the estimated peak, at the stage that holds most."""
    stage = fullest(result)
    return stage["estimated"] / stage["traced"] - 1  # type: ignore[no-any-return]


# --- tables


def markdown(results: Sequence[Result], seed: int) -> Iterator[str]:
    stages = [stage for result in results for stage in result["stages"]]
    lines = sum((Counter(stage["lines"]) for stage in stages), Counter())
    worlds = [parse_layout(result["layout"]).world for result in results]
    models = len({result["model"] for result in results})
    yield f"{len(results)} layouts of {models} models (seed {seed}), on {min(worlds)} to {max(worlds):,} ranks;"
    yield f"{len(stages):,} stages were run.\n"
    yield "| compared | lines | equal | layouts with a difference |"
    yield "|---|---|---|---|"
    for what, number in lines.items():
        wrong = sum(line[0].startswith(what) for stage in stages for line in stage["different"])
        where = sum(any(line[0].startswith(what) for s in r["stages"] for line in s["different"]) for r in results)
        yield f"| {what} | {number:,} | {number - wrong:,} | {where} |"
    yield "\nThe estimated peak against the traced one, at the stage that holds most:\n"
    yield "| layouts | | median | 95% within | worst | beyond 3% |"
    yield "|---|---|---|---|---|---|"
    for name, chosen in _classes():
        if errors := [error(result) for result in results if chosen(result)]:
            off = sorted(map(abs, errors))
            beyond, within = sum(one > LIMIT for one in off), off[int(0.95 * (len(off) - 1))]
            yield f"| {name} | {len(off)} | {statistics.median(off):.2%} | {within:.2%} | {max(errors, key=abs):+.2%} | {beyond} |"
    yield "\nThe ten that are furthest off:\n"
    yield "| model | layout | seq | traced | estimated | | fullest in |"
    yield "|---|---|---|---|---|---|---|"
    for result in sorted(results, key=lambda one: -abs(error(one)))[:10]:
        stage = fullest(result)
        sizes = f"{stage['traced'] / GIB:.2f} GiB | {stage['estimated'] / GIB:.2f} GiB | {error(result):+.2%}"
        yield f"| {result['model']} | `{result['layout']}` | {result['seq']} | {sizes} | {stage['at']} |"


def _classes() -> Iterator[tuple[str, Callable[[Result], bool]]]:
    def word(text: str) -> Callable[[Result], bool]:
        return lambda result: text in result["layout"]

    def model(key: str) -> Callable[[Result], bool]:
        return lambda result: bool(getattr(load_model(result["model"]), key))

    yield "all", lambda result: True
    yield "dense", lambda result: not load_model(result["model"]).experts
    for name in ("experts", "latent", "sinks"):
        yield {"latent": "latent attention", "sinks": "sinks and windows"}.get(name, name), model(name)
    for name in ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v"):
        yield name, word(f":{name}")
    yield "no pipeline", lambda result: parse_layout(result["layout"]).pp == 1
    for zero in range(4):
        yield f"ZeRO {zero}", lambda result, zero=zero: parse_layout(result["layout"]).zero == zero  # type: ignore[misc]
    for mode in ("none", "selective", "full"):
        yield f"recompute: {mode}", lambda result, mode=mode: parse_layout(result["layout"]).recompute == mode  # type: ignore[misc]
    for name in ("cp", "ep", "etp"):
        yield name, lambda result, name=name: getattr(parse_layout(result["layout"]), name) > 1  # type: ignore[misc]
    yield "async tensor parallel", word(":async")


# --- from a file, into it


def _known(path: Path | None) -> dict[tuple[str, str, int, int], Result]:
    if path is None or not path.exists():
        return {}
    results = [estimated_again(json.loads(line)) for line in path.read_text().splitlines()]
    return {_key(result["model"], result["layout"], result["seq"], result["global_batch"]): result for result in results}


def _key(model: str, layout: str, seq: int, batch: int) -> tuple[str, str, int, int]:
    return model, layout, seq, batch


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="layouts (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first layout (default: 0)")
    parser.add_argument("--json", type=Path, help="read what is known, and add what is found")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--known", action="store_true", help="trace nothing: only tables of what the JSON file has")
    options = parser.parse_args(arguments)
    known, results = _known(options.json), []
    for number in range(options.first, options.first + options.count):
        one = case(options.seed, number, RUNS)
        key = _key(one.name, str(one.layout), one.workload.seq, one.workload.global_batch)
        if key not in known and options.known:
            continue
        if key not in known:
            result = compare(one)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            known[key] = result
            different = Counter(line[0] for stage in result["stages"] for line in stage["different"])
            differ = ", ".join(f"{count} of {what}" for what, count in different.items()) or "none"
            peak = f"peak {fullest(result)['traced'] / GIB:6.1f} GiB {error(result):+7.2%}"
            print(
                f"{number:4} {result['seconds']:5.1f} s {one.name:16} {result['layout']:70} {peak}, differ: {differ}",
                flush=True,
            )
        results.append(known[key])
    tables = "\n".join(markdown(results, options.seed)) + "\n"
    print(f"\n{tables}")
    if options.markdown:
        options.markdown.write_text(tables)


if __name__ == "__main__":
    main(sys.argv[1:])
