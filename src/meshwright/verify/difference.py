"""Where do a layout and one process part? At the first module, in the order of execution, that computes something else."""

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
from meshwright.verify.ranks import Report
from meshwright.verify.watch import Place

Phase = Literal["forward", "backward", "parameter", "figure"]
"""`forward`: the module's output differs. `backward`: forward agrees, and the gradient of the module's input differs. `parameter`: both
agree, and a parameter's own gradient differs: its product or its reduction. `figure`: only the loss or the norm is wrong."""

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
    """`module`: its path, or the name of the parameter or the figure. `axes`: those at fault, each by itself or, where none is, together ("dp x cp"); empty
    when it goes wrong on one rank as well."""

    phase: Phase
    module: str
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
    layout: Layout, reference: Report, reports: Sequence[Report], errors: dict[str, float], tolerance: float
) -> Difference | None:
    """The first thing that is off by more than `tolerance`; None if only the loss or the norm is.

    `errors`: of the gradients, by parameter in the order of the model.
    """
    assert reference.record is not None
    expected: tuple[tuple[Phase, dict[Place, Tensor]], ...] = (
        ("forward", reference.record.outputs),
        ("backward", reference.record.gradients),
    )
    for phase, whole in expected:
        worst = _worst_by_module(layout, phase, whole, reports)
        for module, error in worst.items():
            if error > tolerance:
                return Difference(phase, module, error)
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


def _worst_by_module(
    layout: Layout, phase: Phase, whole: dict[Place, Tensor], reports: Sequence[Report]
) -> dict[str, float]:
    """The worst error of each module over ranks and micro-batches, in the order in which one process runs them."""
    worst = {module: 0.0 for module, _ in whole}
    for report in reports:
        assert report.record is not None
        mine = report.record.outputs if phase == "forward" else report.record.gradients
        first = report.coordinates["dp"] * (1 + max((micro_batch for _, micro_batch in mine), default=0))
        for (module, micro_batch), got in mine.items():
            expected = whole[module, first + micro_batch]
            error = relative_error(got, _share(expected, layout, report.coordinates, got), expected)
            worst[module] = max(worst[module], error)
    return worst


def _share(whole_BSD: Tensor, layout: Layout, coordinates: dict[str, int], like: Tensor) -> Tensor:
    """The part of a hidden state, or of the logits, that a rank holds, in the shape that it holds it in."""
    mine, tp = whole_BSD, coordinates["tp"]
    if layout.cp > 1:
        mine = cut_tokens(mine, layout, coordinates["cp"])
    if like.shape[-1] < mine.shape[-1]:  # logits, cut over the vocabulary
        rows = -(-mine.shape[-1] // layout.tp)
        mine = mine[..., rows * tp : rows * (tp + 1)]
    elif layout.sp:
        mine = mine.flatten(0, 1).chunk(layout.tp)[tp]
    return mine.reshape(like.shape) if mine.numel() == like.numel() else mine
