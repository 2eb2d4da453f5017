"""Seconds of collectives of many groups of ranks at once: the lines of their cost curves as arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from meshwright.cost.collectives import CollectiveTimes, Curve
from meshwright.cost.ops import Collective, CollectiveOp
from meshwright.planner.arrays import Bools, Floats, Ints, distinct, taken

FREE = Curve(((0.0, 0.0),))
"""Of a single rank."""


class Ranks(NamedTuple):
    """Groups of ranks on an axis: which of the known (size, stride) each is."""

    axis: str
    which: Ints
    several: Bools
    """Whether there is more than one rank."""


class _Lines(NamedTuple):
    """Of each known group; `latency` and `slope` are [lines, groups]."""

    is_known: Bools
    is_measured: Bools
    """And has no lines."""
    latency: Floats
    slope: Floats
    floor: Floats


class CollectivePrices:
    """Of groups of at most `most` ranks."""

    def __init__(self, times: CollectiveTimes, most: int):
        self.times, self._base = times, most + 1
        self._numbers: dict[int, int] = {}
        self._groups: list[tuple[int, int]] = []
        self._lines: dict[tuple[str, CollectiveOp], _Lines] = {}

    def ranks(self, axis: str, size: Ints, stride: Ints) -> Ranks:
        keys, _, which = distinct(size * self._base + stride)
        numbers = np.array([self._number(key) for key in keys.tolist()], dtype=np.int64)
        return Ranks(axis, numbers[which], size > 1)

    def _number(self, key: int) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self._groups)
            self._groups.append(divmod(key, self._base))
        return self._numbers[key]

    def seconds(self, ranks: Ranks, op: CollectiveOp, nbytes: Ints) -> Floats:
        """Of one call of so many bytes in each of the groups, which are the last dimension of `nbytes`."""
        lines = self._learn(ranks, op)
        if lines.is_measured[ranks.which].any():
            return self._measured(ranks, op, nbytes)
        latency, slope = taken(lines.latency, ranks.which), taken(lines.slope, ranks.which)
        out = latency[0] + slope[0] * nbytes
        for start, each in zip(latency[1:], slope[1:], strict=True):
            np.minimum(out, start + each * nbytes, out=out)
        return np.asarray(np.maximum(lines.floor[ranks.which], out))

    def _learn(self, ranks: Ranks, op: CollectiveOp) -> _Lines:
        """Make sure that the lines of the groups are known."""
        key, none, empty = (ranks.axis, op), np.empty(0, dtype=bool), np.empty((1, 0))
        lines = self._lines.get(key, _Lines(none, none, empty, empty, np.empty(0)))
        more = len(self._groups) - len(lines.floor)
        if more:
            lines = _Lines(*(np.concatenate((its, np.zeros((*its.shape[:-1], more), its.dtype)), axis=-1) for its in lines))
        unknown = ranks.which[~lines.is_known[ranks.which]]
        for number in distinct(unknown).keys.tolist() if len(unknown) else ():
            size, stride = self._groups[number]
            curve = self.times.curve(Collective(*key, size, stride, 0)) if size > 1 else FREE
            lines.is_known[number], lines.is_measured[number] = True, curve is None
            if curve is None:
                continue
            lacking = len(curve.lines) - len(lines.latency)
            if lacking > 0:  # a line that is there twice is no lower
                lines = lines._replace(
                    latency=np.concatenate((lines.latency, np.repeat(lines.latency[:1], lacking, axis=0))),
                    slope=np.concatenate((lines.slope, np.repeat(lines.slope[:1], lacking, axis=0))),
                )
            its = np.array(curve.lines + curve.lines[:1] * (len(lines.latency) - len(curve.lines)))
            lines.latency[:, number], lines.slope[:, number] = its.T
            lines.floor[number] = curve.floor
        self._lines[key] = lines
        return lines

    def _measured(self, ranks: Ranks, op: CollectiveOp, nbytes: Ints) -> Floats:
        """Between measured points there is no line to draw for many at once."""
        out = np.zeros((*nbytes.shape[:-1], len(ranks.which)))
        every = np.broadcast_to(nbytes, out.shape)
        for at in np.ndindex(out.shape):
            size, stride = self._groups[ranks.which[at[-1]]]
            if size > 1:
                out[at] = self.times.seconds(Collective(ranks.axis, op, size, stride, int(every[at])))
        return out
