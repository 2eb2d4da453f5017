"""A picture of memory through a step. matplotlib is imported on use: it comes with the `run` extra."""

from __future__ import annotations

from pathlib import Path

from meshwright.report.plots import save
from meshwright.trace.result import CATEGORIES, StageTrace

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8c8c8c", "#937860", "#8172b3", "#ccb974")


def plot_memory(stage: StageTrace, out: Path, title: str) -> None:
    """Live bytes by category at the fullest moment of every section of the step, in order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(stage.through_time())
    held = [[row.get(name, 0) / 2**30 for _, row in rows] for name in CATEGORIES]
    figure, axes = plt.subplots(figsize=(9, 4))
    axes.stackplot(range(len(rows)), held, labels=CATEGORIES, colors=_COLOURS, step="mid")
    shown = range(0, len(rows), max(1, len(rows) // 24))
    axes.set_xticks(shown, [rows[i][0].name for i in shown], rotation=90, fontsize=7)
    axes.set_ylabel("live GiB")
    axes.set_title(f"{title}, stage {stage.stage}: peak {stage.peak_bytes / 2**30:.1f} GiB", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    figure.tight_layout()
    save(figure, out)
    plt.close(figure)
