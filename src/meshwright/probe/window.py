"""What the measurements share: the rank's device, a common start, and a rate over a window of time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_WINDOWS = 3
"""Every rate is the median of so many windows, so that one disturbance does not move it."""
_PATIENCE = 2.0
"""A rate whose calls are long may take so many times its seconds before the remaining windows are dropped."""
_CHUNKS = 10
"""How often in a window a GPU is waited for: often enough to end in time, too seldom to idle between."""


def rank_device() -> torch.device:
    """Where this rank computes: its GPU under nccl, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def finish(device: torch.device) -> None:
    """Wait for what was started on the device; the CPU computes as it is called."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def over_ranks(values: Sequence[float], op: Any) -> list[float]:
    """Each value reduced over all ranks, which leave this together."""
    device = rank_device()
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def together() -> None:
    """Return on every rank once all have come here. A barrier, without NCCL's need to be told the device."""
    over_ranks([0.0], dist.ReduceOp.SUM)


def seconds_of(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds that `calls` calls take on this rank, its device included."""
    device = rank_device()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    finish(device)
    return time.perf_counter() - start


def call_rate(call: Callable[[], object], seconds: float) -> float:
    """Calls per second of one rank while all ranks of the group call for `seconds`: mean over ranks, median over windows.

    All start at once and count what they finish in the same time, so that ranks that share a core are charged for waiting.
    Calls longer than `seconds` get fewer windows, at least one.
    """
    window, start = seconds / _WINDOWS, time.perf_counter()
    chunk = max(1, int(window / _CHUNKS / seconds_of(call)))  # the first call also compiles, allocates and faults pages in
    rates: list[float] = []
    while len(rates) < _WINDOWS:
        # Agreeing on whether to go on is also the barrier from which the window starts.
        late = over_ranks([time.perf_counter() - start], dist.ReduceOp.MAX)[0] > _PATIENCE * seconds
        if late and rates:
            break
        calls, elapsed = 0, 0.0
        while elapsed < window or not calls:
            elapsed += seconds_of(call, chunk)
            calls += chunk
        rates.append(calls / elapsed)
        chunk = max(1, calls // _CHUNKS)
    summed = over_ranks(rates, dist.ReduceOp.SUM)
    return statistics.median(summed) / dist.get_world_size()


def rounded(figure: float) -> float:
    """Four significant digits: more than any measurement here repeats."""
    return float(f"{figure:.4g}")
