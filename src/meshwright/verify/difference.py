"""Where do a layout and one process part? At the first operator, in the order of execution, that computes something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from meshwright.parallel.context import cut_tokens
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import TIED_NAME, Shard
from meshwright.verify.ranks import Report, Step
from meshwright.verify.watch import Place

Phase = Literal["forward", "backward", "parameter", "figure"]
"""`forward`: the operator's output differs. `backward`: forward agrees, and the gradient of the operator's input differs. `parameter`:
both agree, and a parameter's own gradient differs: its product or its reduction. `figure`: only the loss or the norm is wrong."""

PHASES: tuple[Phase, ...] = ("forward", "backward")
"""Those that operators are watched in."""

AXES: dict[str, tuple[str, ...]] = {
    "dp": ("dp", "zero", "zero_shard", "offload", "offload_to"),
    "tp": ("tp", "sp", "async_tp"),
    "pp": ("pp", "chunks", "schedule", "stage_layers"),
    "cp": ("cp", "cp_ulysses"),
    "ep": ("ep", "etp"),
}
"""The fields of a layout that belong to an axis."""


@dataclass(frozen=True)
class Difference:
    """`operator`: its path, or the name of the parameter or the figure. `axes`: those at fault, each by itself or, where none is, together
    ("dp x cp"); empty when it goes wrong on one rank as well."""

    phase: Phase
    operator: str
    error: float
    axes: tuple[str, ...] = ()


def relative_error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference over the largest element of `scale`, or of `expected`; NaN counts as infinite."""
    if got.shape != expected.shape:
        return torch.inf
    if not got.numel():
        return 0.0
    difference = float((got - expected).abs().max())
    if difference == 0.0:
        return 0.0
    largest = float((expected if scale is None else scale).abs().max())
    error = difference / largest if largest else torch.inf
    return error if error == error else torch.inf


def first_difference(
    step: Step, reference: Report, reports: Sequence[Report], errors: dict[str, float], tolerance: float
) -> Difference | None:
    """The first thing that is off by more than `tolerance`; None if only the loss or the norm is.

    `errors`: of the gradients, by parameter in the order of the model.
    """
    for phase in PHASES:
        for operator, error in worst_by_operator(step, phase, reference, reports).items():
            if error > tolerance:
                return Difference(phase, operator, error)
    return next((Difference("parameter", name, error) for name, error in errors.items() if error > tolerance), None)


def wrong_axes(layout: Layout, fails: Callable[[Layout], bool]) -> tuple[str, ...]:
    """The fewest axes of `layout` that go wrong without the others; see `Difference`."""
    used = [axis for axis in AXES if any(getattr(layout, name) != getattr(Layout(), name) for name in AXES[axis])]
    for size in range(len(used)):
        parts = {axes: with_axes(layout, axes) for axes in combinations(used, size)}
        wrong = [" x ".join(axes) for axes, part in parts.items() if part is not None and fails(part)]
        if wrong:
            return tuple(name for name in wrong if name)
    return (" x ".join(used),)


def with_axes(layout: Layout, axes: Sequence[str]) -> Layout | None:
    """`layout` with the given axes alone; None where they cannot be without the others, as ep without ranks to borrow."""
    kept = {name for axis in axes for name in AXES[axis]}
    dropped = {name: getattr(Layout(), name) for fields in AXES.values() for name in fields if name not in kept}
    try:
        return replace(layout, **dropped)
    except UserError:
        return None


def worst_by_operator(step: Step, phase: Phase, reference: Report, reports: Sequence[Report]) -> dict[str, float]:
    """The worst error of each operator over ranks and micro-batches, in the order in which one process runs them.

    `reference` and `reports`: of steps that were watched. `phase`: forward or backward.
    """
    whole = _recorded(reference, phase)
    worst = dict.fromkeys((operator for operator, _ in whole), 0.0)
    largest = _largest(whole)
    per_rank = step.workload.global_batch // (step.layout.dp * step.layout.micro_batch)
    for report in reports:
        shards = {shard.name: shard for shard, _ in report.gradients}
        first = report.coordinates["dp"] * per_rank
        for (operator, micro_batch), got in _recorded(report, phase).items():
            expected = whole[operator, first + micro_batch]
            share = _share(expected, step, report.coordinates, got, shards.get(_weight(step.model, operator)))
            if share is not None:
                worst[operator] = max(worst[operator], relative_error(got, share, largest[operator]))
    return worst


def _largest(whole: dict[Place, Tensor]) -> dict[str, Tensor]:
    """The largest element of each operator in any micro-batch: where one counts a single token, gradients are zero but for rounding."""
    out: dict[str, Tensor] = {}
    for (operator, _), value in whole.items():
        here = value.abs().max()
        out[operator] = torch.maximum(out.get(operator, here), here)
    return out


def _recorded(report: Report, phase: Phase) -> dict[Place, Tensor]:
    assert report.record is not None, "the step was watched"
    return report.record.outputs if phase == "forward" else report.record.gradients


def _weight(model: Model, operator: str) -> str:
    return TIED_NAME if operator == "head" and model.tied else f"{operator}.weight"


def _share(whole: Tensor, step: Step, coordinates: dict[str, int], like: Tensor, weight: Shard | None) -> Tensor | None:
    """The part of an operator's output, or of its input's gradient, that a rank holds, in the shape that it holds it in.

    Features are cut as the rows of `weight` are, or evenly; where some ranks hold the same ones, as keys and values that are fewer
    than the ranks, each has a part of a sum, and None is returned.
    """
    layout, tp = step.layout, coordinates["tp"]
    mine_BLF = whole.reshape(layout.micro_batch, -1, whole.shape[-1])
    if layout.cp > 1:
        mine_BLF = cut_tokens(mine_BLF, layout, coordinates["cp"])
    features, held = mine_BLF.shape[-1], like.shape[-1]
    rows = [cut for cut in weight.cuts if cut[0] == 0] if weight is not None else []
    if held < features and rows:
        mine_BLF = mine_BLF.narrow(-1, *rows[0][1:])
    elif held * layout.tp == features:
        mine_BLF = mine_BLF.chunk(layout.tp, dim=-1)[tp]
    elif held != features:
        return None
    mine_TF = mine_BLF.flatten(0, 1)
    if mine_TF.numel() == like.numel() * layout.tp:
        mine_TF = mine_TF.chunk(layout.tp)[tp]
    return mine_TF.reshape(like.shape) if mine_TF.numel() == like.numel() else mine_TF
