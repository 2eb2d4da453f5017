"""Seconds of one operator on one accelerator: measured rates where there are any, a roofline otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from meshwright.cost.ops import Attention, Elementwise, Gemm
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
        measured = self._measured_attention[op.backward]
        if measured:
            forward = op.flops * (2 / 5 if op.backward else 1)
            return op.flops / self._shared(measured, forward)
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
        if measured and measured.memory_bandwidth and self.active > 1:
            alone = self.cluster.accelerator.memory_bandwidth
            return min(alone, measured.memory_bandwidth * self.cluster.node.accelerators / self.active)
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
            return self._shared(self._measured_matmul, flops)
        share = self.cluster.accelerator.matmul_share.get(self.precision, load_kernel_constants().matmul_share)
        return self.peak_flops * share / (self._share if self.active > 1 else 1.0)

    def _shared(self, by_active: dict[int, list[tuple[float, float]]], flops: float) -> float:
        """The rate with `active` ranks at work, from those measured: a rank is never quicker than alone, and together they are
        no quicker than the most ranks that were measured."""
        if self.active in by_active:
            return interpolate(by_active[self.active], flops)
        fewest, most = min(by_active), max(by_active)
        return min(interpolate(by_active[fewest], flops), interpolate(by_active[most], flops) * most / self.active)

    @cached_property
    def _measured_matmul(self) -> dict[int, list[tuple[float, float]]]:
        """Active ranks to sorted (FLOPs, rate)."""
        out: dict[int, list[tuple[float, float]]] = {}
        for p in self.cluster.measured.matmul if self.cluster.measured else ():
            if p.precision == self.precision:
                out.setdefault(p.active, []).append((2.0 * p.m * p.n * p.k, p.flops_per_s))
        return {active: sorted(points) for active, points in out.items()}

    @cached_property
    def _measured_attention(self) -> dict[bool, dict[int, list[tuple[float, float]]]]:
        """Backward or not, to active ranks, to sorted (forward FLOPs, rate)."""
        out: dict[bool, dict[int, list[tuple[float, float]]]] = {False: {}, True: {}}
        for p in self.cluster.measured.attention if self.cluster.measured else ():
            if p.precision == self.precision:
                out[False].setdefault(p.active, []).append((p.flops, p.forward_flops_per_s))
                out[True].setdefault(p.active, []).append((p.flops, p.backward_flops_per_s))
        return {backward: {active: sorted(points) for active, points in by.items()} for backward, by in out.items()}


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines between points in log-log, flat beyond both ends. `points` sorted by x, all positive."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            weight = math.log(x / x0) / math.log(x1 / x0) if x1 > x0 else 1.0
            return math.exp(math.log(y0) * (1 - weight) + math.log(y1) * weight)
    return points[-1][1]
