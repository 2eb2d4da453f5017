"""Every layout that llm-analysis can price, priced by it in one process and timed; runs under the interpreter that has it installed.

    PYTHON llm_analysis_search.py < problem.json > answer.json

It has no search of its own: the loop here is over degrees, micro-batch, recompute and ZeRO stage, with sequence parallelism
wherever there is tensor parallelism (its default) and tp within a node (its rule). Its step time is arithmetic alone.
"""

import json
import sys
import time
from importlib.metadata import version

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig
from llm_analysis.logger import logger

LATENCY = 8e-6
"""Seconds of the smallest message in a node: the figure of its own A100 and H100, which its step time does not use."""


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(problem):
    """(tp, pp, dp, micro-batch, recompute, ZeRO stage) of all that are legal."""
    model, gpus, batch = problem["model"], problem["gpus"], problem["global_batch"]
    for tp in divisors(gpus):
        if tp > problem["machine"]["domain"] or model["heads"] % tp:
            continue
        for pp in divisors(gpus // tp):
            dp = gpus // (tp * pp)
            if model["layers"] % pp or batch % dp:
                continue
            for micro_batch in divisors(batch // dp):
                for recompute in ActivationRecomputation:
                    for zero in DSZeRO if dp > 1 else (DSZeRO.NONE,):
                        yield tp, pp, dp, micro_batch, recompute, zero


def main():
    problem = json.load(sys.stdin)
    logger.setLevel("CRITICAL")
    given, machine = problem["model"], problem["machine"]
    model = ModelConfig(
        name="problem",
        num_layers=given["layers"],
        n_head=given["heads"],
        num_key_value_heads=given["kv_heads"],
        hidden_dim=given["hidden"],
        vocab_size=given["vocab"],
        max_seq_len=problem["seq"],
        ffn_embed_dim=given["ffn"],
    )
    gpu = GPUConfig(
        name="problem",
        mem_per_GPU_in_GB=machine["memory_bytes"] / 2**30,
        hbm_bandwidth_in_GB_per_sec=machine["memory_bandwidth"] / 1e9,
        intra_node_bandwidth_in_GB_per_sec=machine["node_bandwidth"] / 1e9,
        intra_node_min_message_latency=LATENCY,
        peak_fp16_TFLOPS=machine["flops"] / 1e12,
        inter_node_bandwidth_in_GB_per_sec=machine["network_bandwidth"] / 1e9,
    )
    began = time.process_time()
    tried, fitting = 0, []
    for tp, pp, dp, micro_batch, recompute, zero in layouts(problem):
        analysis = LLMAnalysis(
            model,
            gpu,
            DtypeConfig(),
            ParallelismConfig(tp_size=tp, pp_size=pp, dp_size=dp, sp_size=tp),
            flops_efficiency=problem["matmul_share"],
        )
        found = analysis.training(
            batch_size_per_gpu=micro_batch,
            global_batch_size=problem["global_batch"],
            seq_len=problem["seq"],
            activation_recomputation=recompute,
            ds_zero=zero,
        )
        tried += 1
        if found["memory_left_per_gpu"] >= 0:
            fitting.append((found["latency_per_iter"], (tp, pp, dp, micro_batch, recompute.name.lower(), zero.value)))
    seconds = time.process_time() - began
    step, (tp, pp, dp, micro_batch, recompute, zero) = min(fitting)
    answer = {
        "version": version("llm-analysis"),
        "cpu_seconds": seconds,
        "candidates": tried,
        "fitting": len(fitting),
        "ties": sum(other == step for other, _ in fitting),
        "step_time_s": step,
        "layout": {
            "dp": dp,
            "tp": tp,
            "sp": tp > 1,
            "pp": pp,
            "chunks": 1,
            "zero": zero,
            "micro_batch": micro_batch,
            "recompute": recompute,
        },
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
