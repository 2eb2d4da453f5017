"""Does a layout compute what one process computes? And if not, where do the two part?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import torch

from meshwright.parallel.ranks import RankError, RankPool
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters
from meshwright.verify.difference import Difference, first_difference, wrong_axes
from meshwright.verify.feed import Feed, check_feed
from meshwright.verify.held import held_gradients
from meshwright.verify.ranks import Report, Sabotage, Step, run_step
from meshwright.verify.shrink import shrink

TOLERANCE: dict[Precision, float] = {"fp64": 1e-9, "fp32": 1e-5}
"""Largest relative error; never to be relaxed."""

TIMEOUT = 600.0
"""Seconds for one step of a shrunk model."""


@dataclass(frozen=True)
class Verification:
    """What came out. Errors are relative: of a gradient, its largest difference over its largest element; infinite where some of it
    is missing. Loss and norm: of the rank that is furthest off."""

    layout: Layout
    """As it was asked for."""
    model: Model
    step: Step
    """What was run: the model and the layout shrunk."""
    tolerance: float
    loss: float
    expected_loss: float
    grad_norm: float
    expected_grad_norm: float
    errors: dict[str, float]
    """By parameter, those of the last layer first."""
    collectives: tuple[tuple[str, str, int, int, int], ...]
    """(axis, operation, group size, calls, bytes) of all ranks together."""
    first_difference: Difference | None = None

    @property
    def worst_parameter(self) -> str:
        return max(self.errors, key=self.errors.__getitem__)

    @property
    def max_relative_error(self) -> float:
        return self.errors[self.worst_parameter]

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.expected_loss) / abs(self.expected_loss)

    @property
    def grad_norm_error(self) -> float:
        return abs(self.grad_norm - self.expected_grad_norm) / abs(self.expected_grad_norm)

    @property
    def worst_error(self) -> float:
        """Of the gradients, the loss and the norm; infinite when one is not a number."""
        errors = (self.max_relative_error, self.loss_error, self.grad_norm_error)
        return max(error if isfinite(error) else torch.inf for error in errors)

    @property
    def ok(self) -> bool:
        return self.worst_error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For `--json`. What is not finite is None: JSON has no word for it."""
        names = ("axis", "op", "group_size", "count", "bytes")
        difference = self.first_difference
        return {
            "ok": self.ok,
            "layout": str(self.layout),
            "model": self.model.name,
            "shrunk": _sizes(self.step.model),
            "ran_as": str(self.step.layout),
            "batch": self.step.feed,
            "seq": self.step.workload.seq,
            "global_batch": self.step.workload.global_batch,
            "tolerance": self.tolerance,
            "max_relative_error": _finite(self.max_relative_error),
            "worst_parameter": self.worst_parameter,
            "loss": _finite(self.loss),
            "loss_error": _finite(self.loss_error),
            "grad_norm": _finite(self.grad_norm),
            "grad_norm_error": _finite(self.grad_norm_error),
            "first_difference": None if difference is None else asdict(difference) | {"error": _finite(difference.error)},
            "parameters": {name: _finite(error) for name, error in self.errors.items()},
            "collectives": [dict(zip(names, row, strict=True)) for row in self.collectives],
        }


class Verifier:
    """Verifies layouts of one model on processes of this machine, and remembers what one process computed."""

    def __init__(self, model: Model, pool: RankPool, sabotage: Sabotage | None = None):
        self.model, self.pool, self.sabotage = model, pool, sabotage
        self._references: dict[Step, Report] = {}

    def verify(self, layout: Layout, feed: Feed = "packed", *, explain: bool = True) -> Verification:
        """Run a shrunk model under `layout` and in one process. `explain`: say where they part, if they do.

        Raises UserError for a layout that cannot split the model or a feed that it cannot have, RankError when a rank raises.
        """
        check_feed(feed, self.model)
        step = Step(*shrink(self.model, layout), feed)
        reference, reports = self.run(step)
        result = Verification(
            layout,
            self.model,
            step,
            TOLERANCE[layout.precision],
            _furthest([report.loss for report in reports], reference.loss),
            reference.loss,
            _furthest([report.grad_norm for report in reports], reference.grad_norm),
            reference.grad_norm,
            _errors(step, reference, reports),
            _total(reports),
        )
        return result if result.ok or not explain else replace(result, first_difference=self._explain(result))

    def run(self, step: Step) -> tuple[Report, list[Report]]:
        """What one process computed, and each rank of the layout."""
        if step.alone not in self._references:
            self._references[step.alone] = self.pool.run(run_step, 1, step.alone, timeout=TIMEOUT)[0]
        reports = self.pool.run(run_step, step.layout.world, step, self.sabotage, timeout=TIMEOUT)
        return self._references[step.alone], reports

    def _explain(self, result: Verification) -> Difference:
        watched = replace(result.step, watched=True)
        found = first_difference(watched, *self.run(watched), result.tolerance)
        if found is None and result.max_relative_error > result.tolerance:
            found = Difference("parameter", result.worst_parameter, torch.inf, "no rank holds all of it")
        if found is None:  # the figures alone are wrong: how they are summed over ranks
            figures = {"loss": result.loss_error, "gradient norm": result.grad_norm_error}
            name = max(figures, key=figures.__getitem__)
            found = Difference("figure", name, figures[name])
        return replace(found, axes=wrong_axes(result.layout, lambda layout: self._fails(layout, result.step.feed)))

    def _fails(self, layout: Layout, feed: Feed) -> bool:
        try:
            return not self.verify(layout, feed, explain=False).ok
        except RankError:
            return True


def _errors(step: Step, reference: Report, reports: Sequence[Report]) -> dict[str, float]:
    """The worst of all ranks, by parameter; infinite where no rank holds some part of a gradient."""
    seen = {shard.name: torch.zeros(gradient.shape, dtype=torch.bool) for shard, gradient in reference.gradients}
    errors = dict.fromkeys(seen, 0.0)
    for shard, value in held_gradients(step, reference, reports):
        errors[shard.name] = max(errors[shard.name], value.error)
        shard.of(seen[shard.name]).fill_(True)
    return {name: error if bool(seen[name].all()) else torch.inf for name, error in errors.items()}


def _furthest(values: Sequence[float], expected: float) -> float:
    """The value that is furthest off; one that is not a number before all others."""
    return max(values, key=lambda value: abs(value - expected) if isfinite(value) else torch.inf)


def _total(reports: Sequence[Report]) -> tuple[tuple[str, str, int, int, int], ...]:
    sums: dict[tuple[str, str, int], list[int]] = {}
    for report in reports:
        for axis, op, size, count, nbytes in report.sent:
            total = sums.setdefault((axis, op, size), [0, 0])
            total[0] += count
            total[1] += nbytes
    return tuple((*key, *sums[key]) for key in sorted(sums))


def _sizes(model: Model) -> dict[str, Any]:
    """What the model was shrunk to."""
    names = ("layers", "hidden", "ffn", "vocab", "heads", "kv_heads", "head_dim")
    sizes: dict[str, Any] = {name: getattr(model, name) for name in names}
    if model.experts is not None:
        sizes |= {"experts": model.experts.count, "top_k": model.experts.top_k, "expert_ffn": model.experts.ffn}
    return sizes | {"parameters": count_parameters(model).total}


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
