"""The parity matrix, mode by mode: for every pair, the worst error of the layouts that combine them, or why none does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from meshwright.parallel.ranks import RankError
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.model import Model
from meshwright.verify.check import Verifier
from meshwright.verify.layouts import MODES, combined, draw_layouts, modes, refusal

Pair = tuple[str, str]

EXCLUDED = "one setting excludes the other"


@dataclass(frozen=True)
class Matrix:
    """`cells`: (worst relative error, over how many layouts) of a pair of modes; of a mode with itself, over all layouts that have it.
    `reasons`: why a pair has no cell. `failed`: layouts that are not equal to one process, or broke down."""

    model: str
    precision: Precision
    modes: tuple[str, ...]
    cells: dict[Pair, tuple[float, int]]
    reasons: dict[Pair, str]
    layouts: int
    failed: tuple[Layout, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; an error that is not finite is None."""
        cells = [
            {"modes": pair, "error": error if isfinite(error) else None, "layouts": seen}
            for pair, (error, seen) in sorted(self.cells.items())
        ]
        empty = [{"modes": pair, "reason": reason} for pair, reason in sorted(self.reasons.items())]
        return {
            "ok": not self.failed,
            "model": self.model,
            "precision": self.precision,
            "layouts": self.layouts,
            "failed": [str(layout) for layout in self.failed],
            "cells": cells,
            "empty": empty,
        }


def parity_matrix(
    verifier: Verifier,
    count: int,
    ranks: int,
    precision: Precision,
    progress: Callable[[int, int, Layout], None],
    seed: int = 0,
) -> Matrix:
    """Verify a covering set of layouts, at least `count`, and sort their errors by pairs of modes.

    Raises UserError when `ranks` leaves no layout.
    """
    drawn = draw_layouts(verifier.model, count, ranks=ranks, seed=seed, precision=precision)
    cells: dict[Pair, tuple[float, int]] = {}
    failed = []
    for done, layout in enumerate(drawn):
        progress(done, len(drawn), layout)
        error, ok = _error(verifier, layout)
        if not ok:
            failed.append(layout)
        for pair in ((a, b) for a in modes(layout) for b in modes(layout)):
            worst, seen = cells.get(pair, (0.0, 0))
            cells[pair] = (max(worst, error), seen + 1)
    names = tuple(mode for mode in MODES if (mode, mode) in cells)
    empty = {(a, b): why_empty(verifier.model, a, b, ranks) for a in names for b in names if (a, b) not in cells}
    return Matrix(verifier.model.name, precision, names, cells, empty, len(drawn), tuple(failed))


def why_empty(model: Model, mode: str, other: str, ranks: int) -> str:
    """Why no layout of at most `ranks` ranks combines two modes."""
    try:
        layout = combined(mode, other)
    except UserError as error:
        return str(error)
    if layout is None:
        return EXCLUDED
    if layout.world > ranks:
        return f"takes {layout.world} ranks or more"
    reason = refusal(model, layout)
    assert reason is not None, f"'{layout}' is legal: a covering set has it"
    return reason


def _error(verifier: Verifier, layout: Layout) -> tuple[float, bool]:
    """(worst error, whether it is within tolerance)."""
    try:
        result = verifier.verify(layout, explain=False)
    except RankError:
        return inf, False
    return result.worst_error, result.ok
