"""Seconds of one operator on one accelerator: measured rates where there are any, a roofline otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from meshwright.cost.program import Attention, Elementwise, Gemm
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.kernels import load_kernel_constants
from meshwright.spec.layout import Precision
from meshwright.spec.precision import STATE_BYTES


@dataclass(frozen=True)
class Kernels:
    """Rates of `cluster` in `precision` while `active` ranks of a node compute."""

    cluster: Cluster
    precision: Precision
    active: int

    def gemm(self, op: Gemm) -> float:
        size = STATE_BYTES[self.precision].parameter
        moved = size * (op.m * op.k + op.k * op.n + op.m * op.n)
        return max(op.flops / self._matmul_rate(op.flops), moved / self.memory_bandwidth)

    def attention(self, op: Attention) -> float:
        measured = self._measured_attention
        if measured:
            return op.flops / interpolate([(f, r[op.backward]) for f, r in measured], op.flops)
        return op.flops / (load_kernel_constants().attention_share * self._matmul_rate(op.flops))

    def elementwise(self, op: Elementwise) -> float:
        return op.bytes / self.memory_bandwidth

    @property
    def peak_flops(self) -> float:
        """Dense peak of one accelerator in this precision. Raises UserError when the catalogue has none."""
        peaks = self.cluster.accelerator.peak_flops
        if self.precision not in peaks:
            raise UserError(f"{self.cluster.accelerator.name} has no {self.precision} rate; it has {', '.join(peaks)}")
        return peaks[self.precision]

    @cached_property
    def memory_bandwidth(self) -> float:
        measured = self.cluster.measured
        if measured and measured.memory_bandwidth:
            return measured.memory_bandwidth * (self._share if self.active == 1 else 1.0)
        accelerator = self.cluster.accelerator
        share = accelerator.memory_share or load_kernel_constants().memory_share
        return accelerator.memory_bandwidth * share / (self._share if self.active > 1 else 1.0)

    @cached_property
    def evidence(self) -> str:
        if self._measured_matmul:
            return f"measured: {self.cluster.measured.source}"  # type: ignore[union-attr]
        share = self.cluster.accelerator.matmul_share.get(self.precision)
        if share:
            return f"published: largest matmul {share:.0%} of peak ({self.cluster.accelerator.source})"
        return f"formula: matmul at {load_kernel_constants().matmul_share:.0%} of peak, the usual share"

    @property
    def _share(self) -> float:
        """How many ranks share one compute slot when all are active."""
        node = self.cluster.node
        return max(1.0, node.accelerators / node.compute_slots) if node.compute_slots else 1.0

    def _matmul_rate(self, flops: float) -> float:
        if self._measured_matmul:
            return interpolate(self._measured_matmul, flops)
        share = self.cluster.accelerator.matmul_share.get(self.precision, load_kernel_constants().matmul_share)
        return self.peak_flops * share / (self._share if self.active > 1 else 1.0)

    @cached_property
    def _measured_matmul(self) -> list[tuple[float, float]]:
        measured = self.cluster.measured
        points = [p for p in measured.matmul if p.precision == self.precision] if measured else []
        active = _nearest([p.active for p in points], self.active)
        return sorted((2.0 * p.m * p.n * p.k, p.flops_per_s) for p in points if p.active == active)

    @cached_property
    def _measured_attention(self) -> list[tuple[float, dict[bool, float]]]:
        measured = self.cluster.measured
        points = [p for p in measured.attention if p.precision == self.precision] if measured else []
        active = _nearest([p.active for p in points], self.active)
        return sorted(
            ((p.flops, {False: p.forward_flops_per_s, True: p.backward_flops_per_s}) for p in points if p.active == active),
            key=lambda point: point[0],
        )


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines between points in log-log, flat beyond both ends. `points` sorted by x, all positive."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            weight = math.log(x / x0) / math.log(x1 / x0) if x1 > x0 else 1.0
            return math.exp(math.log(y0) * (1 - weight) + math.log(y1) * weight)
    return points[-1][1]


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda v: abs(v - wanted), default=wanted)
