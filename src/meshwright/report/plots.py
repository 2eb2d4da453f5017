"""Pictures. matplotlib is imported on use: it comes with the `run` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.cost.timeline import Timeline
from meshwright.schedule.actions import Kind
from meshwright.spec.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    Kind.FORWARD: "#4c72b0",
    Kind.BACKWARD: "#dd8452",
    Kind.BACKWARD_INPUT: "#dd8452",
    Kind.BACKWARD_WEIGHT: "#55a868",
}


def plot_loss(metrics: Path, out: Path) -> None:
    """Loss and gradient norm by step from a JSONL file of metrics."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, left = plt.subplots(figsize=(7, 4))
    left.plot(steps, [row["loss"] for row in rows], color="#4c72b0")
    left.set_xlabel("step")
    left.set_ylabel("loss (nats a token)", color="#4c72b0")
    right = left.twinx()
    right.plot(steps, [row["grad_norm"] for row in rows], color="#dd8452", linewidth=0.8)
    right.set_ylabel("gradient norm", color="#dd8452")
    figure.tight_layout()
    save(figure, out)
    plt.close(figure)


def plot_timeline(timeline: Timeline, out: Path, title: str) -> None:
    """Every stage's forwards and backwards through one step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.5 * timeline.stages + 1.4))
    for span in timeline.spans:
        axes.barh(
            span.stage, span.end - span.start, left=span.start, color=_COLOURS[span.kind], edgecolor="white", linewidth=0.6
        )
        axes.text(
            (span.start + span.end) / 2,
            span.stage,
            str(span.micro_batch),
            ha="center",
            va="center",
            fontsize=7,
            color="white",
        )
    axes.set_yticks(range(timeline.stages), [f"stage {stage}" for stage in range(timeline.stages)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}: bubble {timeline.bubble:.1%}", fontsize=10)
    figure.tight_layout()
    save(figure, out)
    plt.close(figure)


def save(figure: Figure, out: Path) -> None:
    """Raises UserError when `out` cannot be written, or its ending names no format."""
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # an ending that names no format
        raise UserError(f"{out}: {error}") from None
