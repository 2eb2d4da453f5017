"""The search for a layout: candidates a second, whole spaces at a time, and the same problem beside other planners.

    python benchmarks/search.py [--repetitions 3] [--json PATH]
        [--calculon PYTHON CHECKOUT] [--calculon-seconds S] [--llm-analysis PYTHON]

Times are CPU seconds of one process (`time.process_time`), each in a fresh one, without its imports; repetitions interleave and
medians are shown. PYTHON is the interpreter of an environment of its own in which that planner is installed, CHECKOUT a clone of
github.com/calculon-ai/calculon; what is not given is shown as absent. Calculon's search takes minutes: with
`--calculon-seconds` a sample of it is run instead, and its row says how large a one. `peers_search/` has what drives the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from meshwright import api
from meshwright.cost.estimate import Estimator
from meshwright.planner.arrays import Ints
from meshwright.planner.bounds import Bounds, ClosedForm
from meshwright.planner.search import plan
from meshwright.planner.space import Relief, Space, space_on
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.workload import Workload

Row = dict[str, Any]
DRIVERS = Path(__file__).parent / "peers_search"
SAMPLE = 16384
"""Combinations of a large space that are priced (each is a layout for every schedule and sharding that is legal)."""
RELIEVED, AT_ONCE = 2048, 1024
"""Combinations of it whose reliefs are priced too, and layouts at once."""
WARM = 3
"""Passes of the closed form after the first."""


@dataclass(frozen=True, slots=True)
class Problem:
    model: str
    cluster: str
    gpus: int
    seq: int
    global_batch: int

    def __str__(self) -> str:
        return f"{self.model}, {self.gpus:,} x {self.cluster}, seq {self.seq}, batch {self.global_batch}"


CLOSED = (
    Problem("llama-3-70b", "h100-superpod", 640, 4096, 1280),
    Problem("deepseek-v3", "h100-superpod", 2048, 4096, 15360),
)
WHOLE = (
    Problem("llama-3-70b", "h100-superpod", 640, 4096, 1280),
    Problem("llama-3-405b", "h100-superpod", 16_384, 8192, 2048),
    Problem("deepseek-v3", "h100-superpod", 2048, 4096, 15360),
)
SHARED = Problem("gpt3-175b", "a100-superpod", 1024, 2048, 1536)
"""What all can express; model, GPUs and batch of arXiv 2104.04473's largest run of GPT-3."""


CLOSED_FORM, WHOLE_SPACE = "closed form: ", "whole space: "
PEERS = ("llm-analysis", "Calculon")


# --- ours: each runs in a fresh process


def closed_form(problem: Problem) -> Row:
    """Bounds of all layouts of a space, or of a sample of its combinations, with empty caches and again."""
    space, estimator = _space(problem)
    every = len(space.local)
    at = np.arange(every)
    if every > SAMPLE:
        at = np.sort(np.random.default_rng(0).choice(every, SAMPLE, replace=False))
    began = time.process_time()
    closed = ClosedForm(space, estimator)
    made = time.process_time()
    passes = []
    for _ in range(1 + WARM):
        start = time.process_time()
        priced = sum(len(bounds.at) for bounds in closed.price(at))
        passes.append(time.process_time() - start)
    few = np.sort(np.random.default_rng(1).choice(every, min(every, RELIEVED), replace=False))
    return {
        "layouts": space.size(),
        "priced": priced,
        "tables_s": made - began,
        "first_s": passes[0],
        "warm_s": statistics.median(passes[1:]),
        **relieved(closed, few),
    }


def relieved(closed: ClosedForm, at: Ints) -> Row:
    """Layouts of the combinations `at` that do not fit as they are, with every relief in every number of layers: how many, and the seconds
    in which bounds say of each relief how few layers may fit and what so few cost."""
    space, limit = closed.space, closed.estimator.cluster.accelerator.memory_bytes
    every = list(closed.price(at))
    settled, began = 0, time.process_time()
    for bounds in every:
        short = np.flatnonzero(bounds.bytes > limit)
        for start in range(0, len(short), AT_ONCE):
            closed.relieve(bounds, short[start : start + AT_ONCE])
        zero = closed.zero[bounds.sharding[short]]
        for relief in space.reliefs[1:]:
            ways = space.most_layers(bounds.pipeline) if relief.recompute != "none" else 1
            settled += int(space.can_relieve(relief, bounds.at[short], zero).sum()) * ways
    return {"relieved": settled, "relieved_s": time.process_time() - began}


def whole_space(problem: Problem) -> Row:
    model, cluster, work = _read(problem)
    began = time.process_time()
    found = plan(model, cluster, work, problem.gpus)
    seconds = time.process_time() - began
    assert found.best is not None
    return {
        "cpu_seconds": seconds,
        "candidates": found.searched,
        "priced": found.priced,
        "fitting": found.fitting,
        "played": found.played,
        "gap": found.gap,
        "layout": str(found.best.estimate.layout),
        "step_time_s": found.best.estimate.step_time_s,
    }


def narrowed(problem: Problem) -> Row:
    """Exhaustively what Calculon can express too: no context parallelism, 1F1B with or without interleaving in equal stages, ZeRO 0
    or 1 over all ranks, recompute of nothing, of attention, or of all. Every layout gets its bound; those that fit are played in its order
    until no other can be quicker."""
    began = time.process_time()
    space, estimator = _space(problem)
    closed = ClosedForm(space, estimator)
    at = np.flatnonzero((space.columns.cp == 1) & (space.model.layers % space.pp == 0))
    limit = estimator.cluster.accelerator.memory_bytes
    count, queue = 0, list[tuple[float, int, Bounds]]()
    for plain in closed.price(at):
        pipeline = plain.pipeline
        if pipeline.schedule in ("1f1b", "interleaved") and space.model.layers % (pipeline.pp * pipeline.chunks) == 0:
            unsharded = np.array([s.zero <= 1 and s.shard is None for s in space.shardings])[plain.sharding]
            its = plain.take(np.flatnonzero(unsharded))
            for bounds in (its, closed.recomputed(its), closed.recomputed(its, Relief("selective"))):
                count += len(bounds.at)
                queue += [(float(bounds.seconds[i]), int(i), bounds) for i in np.flatnonzero(bounds.bytes <= limit)]
    queue.sort(key=lambda entry: entry[0])
    best, chosen, played = float("inf"), None, 0
    for bound, i, bounds in queue:
        if bound >= best:
            break
        layout = bounds.layout(i)
        price, played = estimator.played(layout), played + 1
        if price.fits and price.step_time_s < best:
            best, chosen = price.step_time_s, layout
    seconds = time.process_time() - began
    return {
        "cpu_seconds": seconds,
        "candidates": count,
        "fitting": len(queue),
        "played": played,
        "layout": str(chosen),
        "step_time_s": best,
    }


def _read(problem: Problem) -> tuple[Any, Any, Workload]:
    return load_model(problem.model), load_cluster(problem.cluster), Workload(problem.seq, problem.global_batch)


def _space(problem: Problem) -> tuple[Space, Estimator]:
    model, cluster, work = _read(problem)
    space = space_on(cluster, model, work, problem.gpus, "bf16")
    return space, Estimator(model, cluster, work)


def _fresh(function: Callable[[Problem], Row], problem: Problem) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, problem).result()


# --- theirs


def theirs(command: Sequence[str], problem: Problem) -> Row:
    """What a driver answers, with its layout in our notation and what we make of that."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(_as_dict(problem)), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    row: Row = json.loads(done.stdout)
    given = row["layout"]
    layout = Layout(**given, schedule="interleaved" if given["chunks"] > 1 else "1f1b")
    ours = api.estimate(
        model=problem.model,
        cluster=problem.cluster,
        seq=problem.seq,
        global_batch=problem.global_batch,
        layout=str(layout),
    )
    return {**row, "layout": str(layout), "our_step_time_s": ours.step_time_s, "we_say_it_fits": ours.fits}


def _as_dict(problem: Problem) -> Row:
    """The problem in SI units, for a driver."""
    model, cluster, _ = _read(problem)
    accelerator, node = cluster.accelerator, cluster.node
    return {
        **{name: getattr(problem, name) for name in ("gpus", "seq", "global_batch")},
        "model": {
            name: getattr(model, name) for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
        },
        "machine": {
            "flops": accelerator.peak_flops["bf16"],
            "memory_bytes": accelerator.memory_bytes,
            "memory_bandwidth": accelerator.memory_bandwidth,
            "node_bandwidth": accelerator.scale_up.bandwidth,
            "network_bandwidth": node.nics * node.nic_bandwidth / node.accelerators,
            "domain": cluster.fabric.domain,
        },
        "matmul_share": accelerator.matmul_share["bf16"],
    }


# --- the run


def measure(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Repetitions of every measurement by its title, interleaved."""
    ours = {
        **{f"{CLOSED_FORM}{p}": (closed_form, p) for p in CLOSED},
        **{f"{WHOLE_SPACE}{p}": (whole_space, p) for p in WHOLE},
        "Meshwright": (whole_space, SHARED),
        "Meshwright, what Calculon expresses": (narrowed, SHARED),
    }
    peers: dict[str, list[str]] = {}
    if args.llm_analysis:
        peers["llm-analysis"] = [args.llm_analysis, str(DRIVERS / "llm_analysis_search.py")]
    if args.calculon:
        python, checkout = args.calculon
        limit = [str(args.calculon_seconds)] if args.calculon_seconds else []
        peers["Calculon"] = [python, str(DRIVERS / "calculon_search.py"), checkout, *limit]
    rows: dict[str, list[Row]] = {name: [] for name in (*ours, *PEERS)}
    for _ in range(args.repetitions):
        for name, (function, problem) in ours.items():
            rows[name].append(_fresh(function, problem))
        for name, command in peers.items():
            rows[name].append(theirs(command, SHARED))
    return rows


def show(rows: dict[str, list[Row]], console: Console) -> None:
    names = ("layouts", "priced", "tables, s", "first, /s", "again, /s", "with relief, /s")
    closed = Table("", *names, title="Closed-form candidates a second")
    columns = ("CPU s", "candidates", "a second", "played", "gap", "layout", "step, s", "our step, s")
    whole = Table("", *columns, title="Whole spaces")
    beside = Table("", *columns, title=f"Beside others: {SHARED}")
    for name, its in rows.items():
        if name.startswith(CLOSED_FORM):
            priced = its[0]["priced"]
            first, warm = (priced / _median(its, key) for key in ("first_s", "warm_s"))
            counts = (f"{its[0]['layouts']:,}", f"{priced:,}")
            title = name.removeprefix(CLOSED_FORM)
            eased = its[0]["relieved"] / _median(its, "relieved_s")
            rates = (f"{first:,.0f}", f"{warm:,.0f}", f"{eased:,.0f}")
            closed.add_row(title, *counts, f"{_median(its, 'tables_s'):.2f}", *rates)
        elif name.startswith(WHOLE_SPACE):
            whole.add_row(name.removeprefix(WHOLE_SPACE), *_cells(its))
        elif not its:
            beside.add_row(name, "absent")
        elif "failed" in its[0]:
            beside.add_row(name, f"failed: {its[0]['failed']}")
        else:
            beside.add_row(name, *_cells(its))
    for table in (closed, whole, beside):
        console.print(table)


def _cells(its: list[Row]) -> list[str]:
    one, seconds = its[0], _median(its, "cpu_seconds")
    gap = f"{one['gap']:.2%}" if "gap" in one else ""
    ours = (
        f"{one['our_step_time_s']:.2f}" + ("" if one["we_say_it_fits"] else " (does not fit)")
        if "our_step_time_s" in one
        else ""
    )
    share = f" ({one['share']:.0%} of its search)" if one.get("share", 1) < 1 else ""
    return [
        f"{seconds:.2f}",
        f"{one['candidates']:,}{share}",
        f"{one['candidates'] / seconds:,.0f}",
        str(one.get("played", "")),
        gap,
        one["layout"],
        f"{one['step_time_s']:.2f}",
        ours,
    ]


def _median(its: list[Row], key: str) -> float:
    return statistics.median(row[key] for row in its)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--calculon", nargs=2, metavar=("PYTHON", "CHECKOUT"))
    parser.add_argument("--calculon-seconds", type=float)
    parser.add_argument("--llm-analysis", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    show(rows, Console(width=None if sys.stdout.isatty() else 240))
    if args.json:
        args.json.write_text(json.dumps({"problem": asdict(SHARED), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
