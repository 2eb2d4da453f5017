"""The live line of a run: loss, gradient norm, tokens/s, MFU, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Without a terminal, a line at most this often (and for the first and last step)."""


class ProgressLine:
    def __init__(self, steps: int, *, show: bool):
        self.steps = steps
        self.console = Console(stderr=True)
        self.last_plain = 0.0
        self.bar: Progress | None = None
        self.show = show
        if show and self.console.is_terminal:
            text = TextColumn(
                "loss {task.fields[loss]:.4f}  grad norm {task.fields[norm]}  {task.fields[rate]:,.0f} tok/s  MFU {task.fields[mfu]}"
            )
            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(20), text, TextColumn("ETA"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=steps, loss=float("nan"), norm="-", rate=0.0, mfu="-")
            self.bar.start()

    def update(self, metrics: dict[str, Any]) -> None:
        if not self.show:
            return
        mfu = "-" if metrics["mfu"] is None else f"{metrics['mfu']:.1%}"
        norm = "overflow, step skipped" if metrics["grad_norm"] is None else f"{metrics['grad_norm']:.3f}"
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=metrics["step"],
                loss=metrics["loss"],
                norm=norm,
                rate=metrics["tokens_per_s"],
                mfu=mfu,
            )
            return
        now = time.monotonic()
        if metrics["step"] in (1, self.steps) or now - self.last_plain > PLAIN_SECONDS:
            self.last_plain = now
            left = (self.steps - metrics["step"]) * metrics["step_time_s"]
            self.console.print(
                f"step {metrics['step']}/{self.steps}  loss {metrics['loss']:.4f}  grad norm {norm}  "
                f"{metrics['tokens_per_s']:,.0f} tok/s  MFU {mfu}  ETA {left:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def packing_progress() -> Iterator[Callable[[int, int], None]]:
    """A byte bar while the corpus is tokenised, shown only on a terminal."""
    with Progress(
        TextColumn("tokenising"), BarColumn(20), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("pack", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
