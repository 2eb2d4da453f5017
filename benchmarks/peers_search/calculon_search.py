"""Calculon's own search of the best execution, in one process, timed; runs under the interpreter that Calculon is installed for.

    PYTHON calculon_search.py CHECKOUT [SECONDS] < problem.json > answer.json

The loop over parameters is that of its `llm-optimal-execution -m --no-tp-overlap`, without its pool of processes; each set of
parameters goes to its `OptimalExecution.search`. CHECKOUT is a clone of its repository, for the efficiency curves of
systems/a100_80g.json; peak rates, memory and bandwidths are the problem's. Its second memory tier is off: no offloading.
The sets come in a shuffled order, the same every time: what is done when SECONDS of CPU time have passed is a sample of them.
"""

import json
import random
import sys
import time
from pathlib import Path

import calculon
from calculon.llm import Llm
from calculon.llm.optimal_execution import OptimalExecution
from calculon.system import System

DATATYPE = "float16"
RECOMPUTE = {"none": "none", "attn_only": "selective", "full": "full"}


def read_system(checkout, machine):
    figures = json.loads((Path(checkout) / "systems" / "a100_80g.json").read_text())
    figures["matrix"][DATATYPE]["tflops"] = machine["flops"] / 1e12
    figures["mem1"].update(GiB=machine["memory_bytes"] / 2**30, GBps=machine["memory_bandwidth"] / 1e9)
    figures["mem2"]["GiB"] = 0
    inside, between = figures["networks"]
    inside.update(bandwidth=machine["node_bandwidth"] / 1e9, size=machine["domain"])
    between["bandwidth"] = machine["network_bandwidth"] / 1e9
    return System(figures)


def parameters(app, system, gpus, batch):
    """What one call of its `search` takes, for each legal set of degrees and modes whose dp divides the batch."""
    for tp in Llm.get_all_tensor_parallelisms(gpus, app.hidden, app.attn_heads):
        for pp in Llm.get_all_pipeline_parallelisms(gpus, tp, app.num_blocks):
            dp = Llm.get_data_parallelism(gpus, tp, pp)
            if batch % dp:
                continue
            for chunks in Llm.get_valid_pipeline_interleavings(app.num_blocks, pp):
                for recompute in RECOMPUTE:
                    for sharded in (True, False) if dp > 1 else (False,):
                        for kind in ("ar", "p2p_rs_ag", "rs_ag"):
                            degrees = (app, system, tp, pp, dp, chunks, batch, recompute, sharded, kind)
                            yield (False, 1, False, gpus, batch, DATATYPE, *degrees, [True], True, False, True)


def main():
    problem = json.load(sys.stdin)
    model, gpus, batch = problem["model"], problem["gpus"], problem["global_batch"]
    app = Llm.Application(
        {
            "hidden": model["hidden"],
            "feedforward": model["ffn"],
            "seq_size": problem["seq"],
            "attn_heads": model["heads"],
            "attn_size": model["head_dim"],
            "num_blocks": model["layers"],
        }
    )
    system = read_system(sys.argv[1], problem["machine"])
    limit = float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    began = time.process_time()
    sets = list(parameters(app, system, gpus, batch))
    random.Random(0).shuffle(sets)
    best, tried, good, done = [], 0, 0, 0
    for given in sets:
        if time.process_time() - began > limit:
            break
        done += 1
        found, its, its_good, *_ = OptimalExecution.search(*given)
        tried, good = tried + its, good + its_good
        best = OptimalExecution.update_list(best, found, 1)
    seconds = time.process_time() - began
    rate, execution, _ = best[0]
    answer = {
        "version": calculon.__version__,
        "cpu_seconds": seconds,
        "candidates": tried,
        "fitting": good,
        "share": done / len(sets),
        "step_time_s": batch / rate,
        "layout": {
            "dp": execution["data_par"],
            "tp": execution["tensor_par"],
            "sp": execution["tensor_par_comm_type"] == "rs_ag" and execution["tensor_par"] > 1,
            "pp": execution["pipeline_par"],
            "chunks": execution["pipeline_interleaving"],
            "zero": int(execution["optimizer_sharding"]),
            "micro_batch": execution["microbatch_size"],
            "recompute": RECOMPUTE[execution["activation_recompute"]],
        },
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
