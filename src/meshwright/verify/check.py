"""Does a layout compute what one process computes? And if not, where do the two part?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.context import cut_tokens
from meshwright.parallel.ranks import RankPool
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload
from meshwright.verify.ranks import Report, Sabotage, one_step
from meshwright.verify.shrink import shrink

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
"""Largest relative error; never to be relaxed."""

AXES: dict[str, tuple[str, ...]] = {
    "dp": ("dp", "zero", "zero_shard"),
    "tp": ("tp", "sp"),
    "pp": ("pp", "chunks", "schedule"),
    "cp": ("cp", "cp_ulysses"),
    "ep": ("ep", "etp"),
}
"""The fields of a layout that belong to an axis."""


@dataclass(frozen=True)
class Difference:
    """Where a layout and one process part: the first module, in the order of the model, whose output differs, and the axes that
    are wrong by themselves or, if none is, together."""

    module: str
    error: float
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """What came out. Errors are relative: of a gradient, its largest difference over its largest element."""

    layout: Layout
    model: Model
    workload: Workload
    tolerance: float
    loss: float
    expected_loss: float
    grad_norm: float
    expected_grad_norm: float
    errors: dict[str, float]
    collectives: tuple[tuple[str, str, int, int, int], ...]
    """(axis, operation, group size, calls, bytes) of all ranks together."""
    first_difference: Difference | None = field(default=None)

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
    def ok(self) -> bool:
        return all(error <= self.tolerance for error in (self.max_relative_error, self.loss_error, self.grad_norm_error))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("axis", "op", "group_size", "count", "bytes")
        difference = self.first_difference
        return {
            "ok": self.ok,
            "layout": str(self.layout),
            "model": self.model.name,
            "parameters_checked": len(self.errors),
            "tolerance": self.tolerance,
            "max_relative_error": self.max_relative_error,
            "worst_parameter": self.worst_parameter,
            "loss": self.loss,
            "loss_error": self.loss_error,
            "grad_norm": self.grad_norm,
            "grad_norm_error": self.grad_norm_error,
            "seq": self.workload.seq,
            "global_batch": self.workload.global_batch,
            "parameters": self.errors,
            "collectives": [dict(zip(names, row, strict=True)) for row in self.collectives],
            "first_difference": None
            if difference is None
            else {"module": difference.module, "error": difference.error, "axes": list(difference.axes)},
        }


class Verifier:
    """Verifies layouts of one model on processes of this machine, and remembers what one process computed."""

    def __init__(self, model: Model, pool: RankPool, sabotage: Sabotage | None = None):
        self.model, self.pool, self.sabotage = model, pool, sabotage
        self._references: dict[tuple[Model, Workload, Layout], Report] = {}

    def verify(self, layout: Layout, *, explain: bool = True) -> Verification:
        """Run a shrunk model under `layout` and in one process. `explain`: say where they part, if they do.

        Raises UserError for a layout that cannot split the model, or in a precision without a tolerance.
        """
        small, workload = shrink(self.model, layout)
        reference = self._one_process(small, workload, layout)
        reports = self.pool.run(one_step, layout.world, small, workload, layout, self.sabotage, timeout=600.0)
        result = Verification(
            layout,
            small,
            workload,
            TOLERANCE[layout.precision],
            reports[0].loss,
            reference.loss,
            reports[0].grad_norm,
            reference.grad_norm,
            _errors(small, reference, reports),
            _total(reports),
        )
        if result.ok or not explain:
            return result
        module, error = _first_module(layout, reference, reports, result)
        return replace(result, first_difference=Difference(module, error, self._wrong_axes(layout)))

    def _one_process(self, model: Model, workload: Workload, layout: Layout) -> Report:
        alone = Layout(micro_batch=layout.micro_batch, precision=layout.precision)
        key = (model, workload, alone)
        if key not in self._references:
            self._references[key] = self.pool.run(one_step, 1, model, workload, alone, timeout=600.0)[0]
        return self._references[key]

    def _wrong_axes(self, layout: Layout) -> tuple[str, ...]:
        """The fewest axes of `layout` that go wrong without the others."""
        used = [axis for axis in AXES if any(getattr(layout, f) != getattr(Layout(), f) for f in AXES[axis])]
        for size in range(1, len(used)):
            wrong = [axes for axes in combinations(used, size) if self._fails(_only(layout, axes))]
            if wrong:
                return tuple(dict.fromkeys(axis for axes in wrong for axis in axes))
        return tuple(used)

    def _fails(self, layout: Layout | None) -> bool:
        return layout is not None and not self.verify(layout, explain=False).ok


def _only(layout: Layout, axes: tuple[str, ...]) -> Layout | None:
    """`layout` with the given axes alone; None where they cannot be without the others, as ep without ranks to borrow."""
    kept = {name: getattr(layout, name) for axis in axes for name in AXES[axis]}
    try:
        return Layout(
            **kept,
            micro_batch=layout.micro_batch,
            recompute=layout.recompute,
            recompute_parts=layout.recompute_parts,
            recompute_layers=layout.recompute_layers,
            precision=layout.precision,
        )
    except ValueError:
        return None


def relative_error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference over the largest element; NaN counts as infinite."""
    largest = float((expected if scale is None else scale).abs().max())
    difference = float((got - expected).abs().max())
    if difference == 0.0:
        return 0.0
    error = difference / largest if largest else torch.inf
    return error if error == error else torch.inf


def _errors(model: Model, reference: Report, reports: list[Report]) -> dict[str, float]:
    """The worst of all ranks, by parameter.

    A key bias without rotary positions shifts all scores of a query alike: its gradient is zero and what is computed is
    rounding, so the query bias of the same layer sets the scale.
    """
    whole = {shard.name: gradient for shard, gradient in reference.gradients}
    errors = dict.fromkeys(whole, 0.0)
    for report in reports:
        for shard, gradient in report.gradients:
            at = shard.name
            if model.rope is None and at.endswith("qkv.k.bias"):
                at = at.replace("qkv.k", "qkv.q")
            error = relative_error(gradient, shard.of(whole[shard.name]), whole[at])
            errors[shard.name] = max(errors[shard.name], error)
    return errors


def _total(reports: list[Report]) -> tuple[tuple[str, str, int, int, int], ...]:
    sums: dict[tuple[str, str, int], list[int]] = {}
    for report in reports:
        for axis, op, size, count, nbytes in report.sent:
            total = sums.setdefault((axis, op, size), [0, 0])
            total[0] += count
            total[1] += nbytes
    return tuple((*key, *sums[key]) for key in sorted(sums))


def _first_module(layout: Layout, reference: Report, reports: list[Report], result: Verification) -> tuple[str, float]:
    """The first module whose output differs; where all agree, forward is right, and the worst gradient stands for backward."""
    order: Callable[[str], int] = lambda name: -1 if name == "embedding" else int(name.removeprefix("layers."))  # noqa: E731
    worst: dict[str, float] = {}
    for report in reports:
        for index, outputs in enumerate(report.outputs):
            whole = reference.outputs[report.coordinates["dp"] * len(report.outputs) + index]
            for name, output in outputs.items():
                error = relative_error(output, _share(whole[name], layout, report.coordinates, output), whole[name])
                worst[name] = max(worst.get(name, 0.0), error)
    wrong = sorted((name for name, error in worst.items() if error > result.tolerance), key=order)
    if wrong:
        return f"{wrong[0]}, forward", worst[wrong[0]]
    return f"{result.worst_parameter}, backward", result.max_relative_error


def _share(whole_BSD: Tensor, layout: Layout, coordinates: dict[str, int], like: Tensor) -> Tensor:
    """The tokens that a rank holds of a hidden state, in the shape that it holds them in."""
    mine = cut_tokens(whole_BSD, layout, coordinates["cp"]) if layout.cp > 1 else whole_BSD
    if layout.sp:
        mine = mine.flatten(0, 1).chunk(layout.tp)[coordinates["tp"]]
    return mine.view(like.shape)
