"""The parity matrix: the cases of a sweep, and for every pair of modes the worst error of the layouts that combine them, or why
none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from meshwright.parallel.ranks import RankError, RankPool
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Precision
from meshwright.spec.model import Model
from meshwright.verify.check import Verifier
from meshwright.verify.layouts import MODES, combined, modes, refusal
from meshwright.verify.sweep import Case, draw_cases

Pair = tuple[str, str]

EXCLUDED = "one setting excludes the other"


@dataclass(frozen=True)
class Outcome:
    """Of one case: relative errors, infinite where a rank broke down."""

    case: Case
    gradient: float
    loss: float
    grad_norm: float
    ok: bool

    @property
    def worst(self) -> float:
        return max(self.gradient, self.loss, self.grad_norm)


@dataclass(frozen=True)
class Matrix:
    """`empty`: why no layout of at most `ranks` ranks combines a pair of modes."""

    title: str
    precision: Precision
    outcomes: tuple[Outcome, ...]
    empty: dict[Pair, str]

    @property
    def ok(self) -> bool:
        return all(outcome.ok for outcome in self.outcomes)

    @property
    def cells(self) -> dict[Pair, tuple[float, int]]:
        """(worst relative error, over how many cases) of a pair of modes; of a mode with itself, over all cases that have it."""
        return _worst((pair, outcome.worst) for outcome in self.outcomes for pair in _pairs(outcome.case))

    @property
    def fixtures(self) -> dict[Pair, tuple[float, int]]:
        """The same by (model, batch)."""
        return _worst(((o.case.model.name, o.case.feed), o.worst) for o in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; an error that is not finite is None."""
        worst = {name: max(getattr(o, name) for o in self.outcomes) for name in ("gradient", "loss", "grad_norm")}
        return {
            "ok": self.ok,
            "title": self.title,
            "precision": self.precision,
            "cases": len(self.outcomes),
            "layouts": len({outcome.case.layout for outcome in self.outcomes}),
            "worst": {name: _finite(error) for name, error in worst.items()},
            "failed": [str(outcome.case) for outcome in self.outcomes if not outcome.ok],
            "modes": [mode for mode in MODES if (mode, mode) in self.cells],
            "cells": [
                {"modes": pair, "error": _finite(error), "cases": seen} for pair, (error, seen) in self.cells.items()
            ],
            "empty": [{"modes": pair, "reason": reason} for pair, reason in self.empty.items()],
            "fixtures": [
                {"model": model, "batch": batch, "error": _finite(error), "cases": seen}
                for (model, batch), (error, seen) in self.fixtures.items()
            ],
        }


def parity_matrix(
    title: str,
    models: tuple[Model, ...],
    pool: RankPool,
    progress: Callable[[int, int, Case], None],
    *,
    count: int,
    ranks: int,
    precision: Precision,
) -> Matrix:
    """Verify a covering set of cases, of at least `count` layouts, and sort their errors by pairs of modes.

    `progress`: called with (done, of how many, next) before each. Raises UserError when `ranks` leaves no layout.
    """
    drawn = draw_cases(models, count, ranks=ranks)
    verifiers = {model: Verifier(model, pool) for model in models}
    outcomes = []
    for done, case in enumerate(drawn):
        progress(done, len(drawn), case)
        outcomes.append(verify_case(verifiers[case.model], case, precision))
    return Matrix(title, precision, tuple(outcomes), _empty(models, drawn, ranks))


def verify_case(verifier: Verifier, case: Case, precision: Precision) -> Outcome:
    """`case`, in `precision`."""
    try:
        result = verifier.verify(replace(case.layout, precision=precision), case.feed, explain=False)
    except RankError:
        return Outcome(case, inf, inf, inf, False)
    gradient, loss, norm = (
        error if isfinite(error) else inf
        for error in (result.max_relative_error, result.loss_error, result.grad_norm_error)
    )
    return Outcome(case, gradient, loss, norm, result.ok)


def why_empty(models: Sequence[Model], mode: str, other: str, ranks: int) -> str:
    """Why no layout of at most `ranks` ranks combines two modes, for the first of the models."""
    model = models[0]
    try:
        layout = combined(model, mode, other)
    except UserError as error:
        return str(error)
    if layout is None:
        return EXCLUDED
    if layout.world > ranks:
        return f"takes {layout.world} ranks or more"
    reason = refusal(model, layout)
    assert reason is not None, f"'{layout}' is legal: a covering set has it"
    return reason


def _empty(models: Sequence[Model], cases: Sequence[Case], ranks: int) -> dict[Pair, str]:
    covered = {pair for case in cases for pair in _pairs(case)}
    names = [mode for mode in MODES if (mode, mode) in covered]
    pairs = ((later, mode) for at, mode in enumerate(names) for later in names[at + 1 :])
    return {pair: why_empty(models, *pair, ranks) for pair in pairs if pair not in covered}


def _pairs(case: Case) -> list[Pair]:
    """Of its modes, each with itself and with those before it in MODES."""
    has = modes(case.layout)
    mine = [mode for mode in MODES if mode in has]
    return [(later, mode) for at, mode in enumerate(mine) for later in mine[at:]]


def _worst(errors: Iterable[tuple[Pair, float]]) -> dict[Pair, tuple[float, int]]:
    out: dict[Pair, tuple[float, int]] = {}
    for pair, error in errors:
        worst, seen = out.get(pair, (0.0, 0))
        out[pair] = (max(worst, error), seen + 1)
    return dict(sorted(out.items()))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
