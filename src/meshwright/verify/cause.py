"""What a wrong value tells of its cause: a sum that was not taken, or one taken too often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from meshwright.verify.held import Held, relative_error

DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("ep", "etp", "edp")
"""The coordinates of a rank in the two equations of the world, but for pp in the second."""


def cause(values: Sequence[Held], tolerance: float) -> str | None:
    """Why `values` of one operator, or of one parameter, by rank and micro-batch, are wrong; None where it is neither a missing sum nor a
    factor."""
    if not all(value.got.shape == value.expected.shape for value in values):
        return "its shape is not what a rank should hold"
    if not all(bool(value.got.isfinite().all()) for value in values):
        return "not all of it is finite"
    for axes, groups in _groups(values):
        if all(_sums_up(group, tolerance) for group in groups):
            return f"it would be right summed over {' x '.join(axes)}: that sum is missing"
    factor = _factor(values)
    if all(relative_error(value.got, value.expected * factor, value.scale) <= tolerance for value in values):
        return "it is zero" if abs(factor) <= tolerance else f"it is {factor:.6g} times what it should be, on every rank"
    return None


def _groups(values: Sequence[Held]) -> Iterator[tuple[tuple[str, ...], list[list[Held]]]]:
    """Axes, the fewest first, and the ranks that differ along them alone and should all hold the same."""
    splits = [(axes, DENSE) for size in range(1, len(DENSE) + 1) for axes in combinations(DENSE, size)]
    for axes, coordinates in (*splits, (("edp",), (*EXPERT, "pp"))):
        groups: dict[tuple[int, ...], list[Held]] = {}
        for value in values:
            others = (value.coordinates[axis] for axis in coordinates if axis not in axes)
            groups.setdefault((*others, value.micro_batch), []).append(value)
        if all(len(group) > 1 and _agree(group) for group in groups.values()):
            yield axes, list(groups.values())


def _agree(group: Sequence[Held]) -> bool:
    first = group[0].expected
    return all(value.expected.shape == first.shape and torch.equal(value.expected, first) for value in group)


def _sums_up(group: Sequence[Held], tolerance: float) -> bool:
    total = torch.stack([value.got for value in group]).sum(0)
    return relative_error(total, group[0].expected, group[0].scale) <= tolerance


def _factor(values: Sequence[Held]) -> float:
    """What the expected values are best multiplied by, in the sense of least squares."""
    squares = sum(float(value.expected.square().sum()) for value in values)
    products = sum(float((value.expected * value.got).sum()) for value in values)
    return products / squares if squares else 0.0
