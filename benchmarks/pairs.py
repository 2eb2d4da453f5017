"""Two sides timed in turn (A B, B A, A B, ...), so that a slow moment of the machine falls on both: what every benchmark of step times
beside another side does."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

WARM_UP = 2
Step = Callable[[], object]
Times = tuple[list[float], list[float]]
"""Of ours and of theirs, in seconds."""


@dataclass(kw_only=True)
class Paired:
    """Step times in seconds, of the slowest rank; entry i of both was measured side by side."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the ratios of the pairs."""
        low, _, high = statistics.quantiles([a / b for a, b in zip(self.ours, self.theirs, strict=True)], n=4)
        return low, high

    @property
    def spread(self) -> str:
        low, high = self.quartiles
        return f"{low:.3f} to {high:.3f}"

    @property
    def milliseconds(self) -> list[str]:
        """Medians."""
        return [f"{statistics.median(times) * 1e3:.0f}" for times in (self.ours, self.theirs)]


def interleaved(ours: Step, theirs: Step, repetitions: int) -> Times:
    """This rank's times of both; all ranks of the world must call it."""
    steps, times = (ours, theirs), ([], [])
    for i in range(-WARM_UP, repetitions):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            seconds = _timed(steps[which])
            if i >= 0:
                times[which].append(seconds)
    return times


def slowest(ranks: Sequence[Times]) -> dict[str, list[float]]:
    """The fields of `Paired`, of what `interleaved` gave on each rank."""
    ours, theirs = ([max(times) for times in zip(*side, strict=True)] for side in zip(*ranks, strict=True))
    return {"ours": ours, "theirs": theirs}


def print_environment(console: Console, about: dict[str, str | int]) -> None:
    console.print("; ".join(f"{key} {value}" for key, value in about.items()), highlight=False)


def write(path: Path, about: dict[str, str | int], results: Sequence[Paired], **more: Any) -> None:
    """All raw times, as JSON."""
    rows = [asdict(result) | {"ratio": result.ratio, "quartiles": result.quartiles} for result in results]
    path.write_text(json.dumps({"environment": about, **more, "results": rows}, indent=1) + "\n")


def _timed(step: Step) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
