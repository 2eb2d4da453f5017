"""Where do a layout and one process part? At the first operator, in the order of execution, that computes something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.verify.cause import cause
from meshwright.verify.held import PHASES, Held, Phase, held_gradients, held_values
from meshwright.verify.ranks import Report, Step

AXES: dict[str, tuple[str, ...]] = {
    "dp": ("dp", "zero", "zero_shard", "offload", "offload_to"),
    "tp": ("tp", "sp", "async_tp"),
    "pp": ("pp", "chunks", "schedule", "stage_layers"),
    "cp": ("cp", "cp_ulysses"),
    "ep": ("ep", "etp"),
}
"""The fields of a layout that belong to an axis; `async_ep` belongs to two, pp and ep."""


@dataclass(frozen=True)
class Difference:
    """`operator`: its path, or the name of the parameter or the figure. `sent`: in it, by a rank that is wrong. `axes`: those at fault,
    each by itself or, where none is, together ("dp x cp"); empty when it goes wrong on one rank as well."""

    phase: Phase
    operator: str
    error: float
    cause: str | None = None
    sent: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()


def first_difference(step: Step, reference: Report, reports: Sequence[Report], tolerance: float) -> Difference | None:
    """The first thing that is off by more than `tolerance`, in a step that was watched; None if only the loss or the norm is."""
    for phase in PHASES:
        for operator, values in held_values(step, phase, reference, reports).items():
            if (found := _difference(phase, operator, values, tolerance)) is not None:
                return found
    gradients: dict[str, list[Held]] = {shard.name: [] for shard, _ in reference.gradients}
    for shard, value in held_gradients(step, reference, reports):
        gradients[shard.name].append(value)
    found_all = (_difference("parameter", name, values, tolerance) for name, values in gradients.items())
    return next((found for found in found_all if found is not None), None)


def _difference(phase: Phase, operator: str, values: Sequence[Held], tolerance: float) -> Difference | None:
    worst = max(values, key=lambda value: value.error, default=None)
    if worst is None or worst.error <= tolerance:
        return None
    return Difference(phase, operator, worst.error, cause(values, tolerance), worst.sent)


def worst_by_operator(step: Step, phase: Phase, reference: Report, reports: Sequence[Report]) -> dict[str, float]:
    """The worst error of each operator over ranks and micro-batches; see `held_values`."""
    return {
        operator: max((value.error for value in values), default=0.0)
        for operator, values in held_values(step, phase, reference, reports).items()
    }


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
    kept |= {"async_ep"} if {"pp", "ep"} <= set(axes) else set()
    fields = {"async_ep", *(name for its in AXES.values() for name in its)}
    dropped = {name: getattr(Layout(), name) for name in fields - kept}
    try:
        return replace(layout, **dropped)
    except UserError:
        return None
