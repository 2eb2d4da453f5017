"""Seconds of a kernel: measured rates where there are any, a roofline otherwise."""

from __future__ import annotations

from math import sqrt

import pytest
from cost_cases import H100, with_measured
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.kernels import Kernels, interpolate
from meshwright.cost.ops import Attention, Gemm
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import AttentionPoint, MatmulPoint, Measured
from meshwright.spec.errors import UserError
from meshwright.spec.kernels import load_kernel_constants

POINTS = st.lists(
    st.tuples(st.floats(1.0, 1e12), st.floats(1e-3, 1e12)), min_size=1, max_size=6, unique_by=lambda p: p[0]
).map(sorted)


@given(POINTS, st.floats(0.1, 1e13))
def test_interpolation_stays_between_its_neighbours(points: list[tuple[float, float]], x: float) -> None:
    y = interpolate(points, x)
    below = [p for p in points if p[0] <= x] or points[:1]
    above = [p for p in points if p[0] >= x] or points[-1:]
    low, high = sorted((below[-1][1], above[0][1]))
    assert low * (1 - 1e-9) <= y <= high * (1 + 1e-9)


def test_interpolation_is_straight_in_log_log_and_flat_beyond_the_ends() -> None:
    points = [(1.0, 10.0), (100.0, 1000.0), (10000.0, 1000.0)]
    assert [interpolate(points, x) for x in (1.0, 100.0, 10000.0)] == pytest.approx([10, 1000, 1000])
    assert interpolate(points, 10.0) == pytest.approx(100)
    assert interpolate(points, sqrt(1e6)) == pytest.approx(1000)
    assert (interpolate(points, 0.01), interpolate(points, 1e9)) == (10, 1000)
    assert interpolate(points[:1], 55.0) == 10


def test_a_large_product_runs_at_the_share_of_the_peak_and_a_thin_one_at_the_memorys_rate() -> None:
    kernels, constants = Kernels(H100, "bf16", 1), load_kernel_constants()
    rate = 0.803 * 989e12 * constants.sustained_share
    # 32 x 64 tiles of 256 x 128 on 132 processors: 16 waves, the last of which is half empty.
    wave = 2 * 256 * 128 * (8192 + constants.tile_fill) / (rate / 132)
    assert kernels.gemm(Gemm("large", 8192, 8192, 8192)) == pytest.approx(16 * wave + constants.gap)
    assert kernels.gemm(Gemm("thin", 1, 8192, 8192)) == pytest.approx(
        2 * (8192 + 8192 + 8192**2) / kernels.memory_bandwidth + constants.gap
    )
    assert "published" in kernels.evidence
    assert "formula" in Kernels(load_cluster("mi300x-roce"), "fp32", 1).evidence
    with pytest.raises(UserError, match="h100-sxm has no fp64 rate; it has fp32,"):
        _ = Kernels(H100, "fp64", 1).peak_flops


def test_measured_rates_replace_the_formula() -> None:
    matmul = tuple(
        MatmulPoint(precision="bf16", m=n, n=n, k=n, active=1, flops_per_s=rate) for n, rate in ((64, 1e12), (4096, 4e14))
    )
    attention = (
        AttentionPoint(precision="bf16", flops=1e9, active=1, forward_flops_per_s=1e14, backward_flops_per_s=5e13),
    )
    cluster = with_measured(H100, Measured(source="my bench", matmul=matmul, attention=attention, memory_bandwidth=1e12))
    kernels = Kernels(cluster, "bf16", 1)
    assert kernels.gemm(Gemm("measured", 4096, 4096, 4096)) == pytest.approx(2 * 4096**3 / 4e14)
    forward, backward = (Attention("a", 1, 8, 1024, 64, 64, None, backward=b) for b in (False, True))
    assert kernels.attention(forward) == pytest.approx(forward.flops / 1e14)
    assert kernels.attention(backward) == pytest.approx(backward.flops / 5e13)
    assert Kernels(cluster, "bf16", H100.node.accelerators).memory_bandwidth == 1e12
    assert kernels.evidence == "measured: my bench"
    assert "measured" not in Kernels(cluster, "fp32", 1).evidence
