"""The axis-by-axis parity matrix: for every pair of modes, the worst error of a layout that combines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.verify.check import Verification, Verifier
from meshwright.verify.layouts import draw_layouts, modes


@dataclass(frozen=True)
class Matrix:
    """`cells[mode, other]`: worst relative error, and over how many layouts; the diagonal is over all layouts with the mode."""

    model: str
    modes: tuple[str, ...]
    cells: dict[tuple[str, str], tuple[float, int]]
    layouts: int
    failed: tuple[Verification, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        cells = [{"modes": pair, "error": error, "layouts": seen} for pair, (error, seen) in sorted(self.cells.items())]
        failed = [str(result.layout) for result in self.failed]
        return {"model": self.model, "ok": not failed, "layouts": self.layouts, "cells": cells, "failed": failed}


def parity_matrix(
    verifier: Verifier, model: Model, count: int, ranks: int, progress: Callable[[int, int, Layout], None], seed: int = 0
) -> Matrix:
    """Verify a covering set of layouts, at least `count`, and sort their errors by pairs of modes."""
    drawn = draw_layouts(model, count, ranks=ranks, seed=seed)
    cells: dict[tuple[str, str], tuple[float, int]] = {}
    failed = []
    for done, layout in enumerate(drawn):
        progress(done, len(drawn), layout)
        result = verifier.verify(layout, explain=False)
        if not result.ok:
            failed.append(result)
        error = max(result.max_relative_error, result.loss_error, result.grad_norm_error)
        its = sorted(modes(layout))
        for pair in ((a, b) for a in its for b in its):
            worst, seen = cells.get(pair, (0.0, 0))
            cells[pair] = (max(worst, error), seen + 1)
    names = tuple(sorted({mode for mode, _ in cells}))
    return Matrix(model.name, names, cells, len(drawn), tuple(failed))
