"""Linears of 8-bit factors: how far they round, which they are, and where they are refused. PyTorch emulates the product on the CPU,
so all but the GPU's kernels is under test."""

from __future__ import annotations

from types import SimpleNamespace

import fp8_workers
import pytest
import torch
from fixtures import WORKLOAD

from meshwright.parallel.fp8 import Fp8Weight, fp8_input_gradient, fp8_product, is_eligible, refuse_fp8
from meshwright.parallel.linear import product
from meshwright.spec.errors import UserError
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import RankError, run_distributed

E4M3, E5M2, BF16 = 2.0**-4, 2.0**-3, 2.0**-8
"""Half a unit in the last place, relative: with m bits of mantissa a number is rounded by at most 2^-(m + 1) of itself."""
WIDE = Model(
    name="wide", family="llama", layers=2, hidden=64, ffn=128, vocab=101, heads=4, kv_heads=4, head_dim=16, max_positions=64
)
"""Every linear divides by 16, on two ranks too."""


def bound(a: torch.Tensor, b: torch.Tensor, a_error: float, b_error: float) -> torch.Tensor:
    """Of the error of a @ b, element by element: each factor's relative rounding, and for elements far below the largest (where the
    8-bit format is subnormal) a distance that the largest sets; then the rounding to bf16."""
    tiny = 2.0**-8 / 448  # half the smallest e4m3, 2^-9, as a part of the largest; e5m2 reaches further down
    a_off, b_off = a.abs() * a_error + a.abs().max() * tiny, b.abs() * b_error + b.abs().max() * tiny
    return (a_off @ b.abs() + a.abs() @ b_off + a_off @ b_off) + BF16 * (a @ b).abs() + 1e-6


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_products_round_as_much_as_their_formats(size: float) -> None:
    """Whatever the size of the numbers: they are scaled to fill the format."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 64), (48, 64), (3, 5, 48)))
    x, w, g = ((each * size).bfloat16() for each in (x, w, g))
    for got, a, b, a_error in (
        (fp8_product(x, w), x, w.t(), E4M3),
        (fp8_input_gradient(g, w), g, w, E5M2),
    ):
        a, b = a.flatten(0, 1).double(), b.double()
        error = (got.flatten(0, 1).double() - a @ b).abs()
        assert (error <= bound(a / size, b / size, a_error, E4M3) * size**2).all()
        assert error.max() > 4 * BF16 * (a @ b).abs().mean()  # it is not the bf16 product


def of_format(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Numbers that the format has, its largest among them, so that scaling keeps each as it is; in bf16, which has them too."""
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.finfo(dtype).max / 8).to(dtype).bfloat16()
    x.view(-1)[0] = torch.finfo(dtype).max
    return x


def test_numbers_that_the_formats_have_are_multiplied_exactly() -> None:
    """Weights and activations in e4m3, gradients in e5m2: in any other format some of them would be rounded."""
    x, w = of_format(torch.float8_e4m3fn, 8, 64), of_format(torch.float8_e4m3fn, 48, 64)
    g = of_format(torch.float8_e5m2, 8, 48)
    for got, expected in (
        (fp8_product(x, w), x.double() @ w.double().t()),
        (fp8_input_gradient(g, w), g.double() @ w.double()),
    ):
        error = (got.double() - expected).abs()
        assert (error <= BF16 * expected.abs() + 1e-6 * expected.abs().max()).all()


def test_a_factor_of_zeros_gives_zeros() -> None:
    assert not fp8_product(torch.zeros(4, 16).bfloat16(), torch.ones(16, 16).bfloat16()).any()


def test_only_marked_weights_are_multiplied_in_8_bits() -> None:
    x, w = torch.randn(4, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    assert torch.equal(product(x, Fp8Weight(w)), fp8_product(x, w))
    assert torch.equal(product(x, torch.nn.Parameter(w)), x @ w.t())


@pytest.mark.parametrize(
    ("name", "shape", "eligible"),
    [
        ("layers.0.attention.qkv.q.weight", (32, 64), True),
        ("layers.3.mlp.down.weight", (64, 16), True),
        ("layers.0.attention.qkv.q.weight", (24, 64), False),
        ("layers.0.attention.qkv.q.bias", (32,), False),
        ("layers.0.moe.router.weight", (16, 64), False),
        ("layers.0.moe.experts.up.weight", (4, 32, 64), False),
        ("embedding.tokens.weight", (64, 64), False),
        ("head.weight", (64, 64), False),
    ],
)
def test_which_weights_are_multiplied_in_8_bits(name: str, shape: tuple[int, ...], eligible: bool) -> None:
    assert is_eligible(name, shape) is eligible


# --- in the engine


@pytest.mark.parametrize("layout", ["mb4", "tp2:async mb4", "tp2 pp2 mb4", "dp2:zero3 mb2 ac:full"])
def test_gradients_are_those_of_bf16_up_to_the_format(layout: str) -> None:
    """Roundings are independent, so their squares add up. Uniform within half a unit, one is u / sqrt(3) at most. A gradient has
    behind it 4 products of each of the 2 layers forward, of two e4m3 factors each, and as many backward, of an e5m2 and an e4m3
    one; the residual stream, which is not rounded so, only makes the sum less."""
    products = 4 * WIDE.layers
    bound = (products * (2 * E4M3**2 + E5M2**2 + E4M3**2) / 3) ** 0.5
    (exact,) = run_distributed(fp8_workers.gradients, 1, WIDE, WORKLOAD, parse_layout("mb4 fp32"))
    whole = {shard.name: gradient for shard, gradient in exact.gradients}
    parsed = parse_layout(f"{layout} fp8")
    bf16 = run_distributed(fp8_workers.gradients, parsed.world, WIDE, WORKLOAD, parse_layout(f"{layout} bf16"))
    for rank, other in zip(run_distributed(fp8_workers.gradients, parsed.world, WIDE, WORKLOAD, parsed), bf16, strict=True):
        assert rank.eligible == rank.linears
        assert rank.loss == pytest.approx(exact.loss, rel=E4M3**2)
        coarser = 0
        for (shard, gradient), (_, close) in zip(rank.gradients, other.gradients, strict=True):
            expected = shard.of(whole[shard.name])
            error = ((gradient - expected).norm() / expected.norm()).item()
            assert error <= bound, f"{shard.name}: relative error {error:.1e}"
            coarser += error > 4 * ((close - expected).norm() / expected.norm()).item()
        assert coarser > len(rank.gradients) / 2


def test_the_engine_refuses_a_cpu() -> None:
    with pytest.raises(
        RankError, match=r"8\.9 or more, or ROCm gfx94x or gfx95x; this rank computes on the CPU: take bf16"
    ):
        run_distributed(fp8_workers.build_on_cpu, 1, WIDE, WORKLOAD, parse_layout("mb4 fp8"))


@pytest.mark.parametrize(
    ("hip", "device", "refused"),
    [
        (None, SimpleNamespace(name="A100", major=8, minor=0), "A100 (compute capability 8.0): take bf16"),
        (None, SimpleNamespace(name="L40S", major=8, minor=9), None),
        (None, SimpleNamespace(name="H100", major=9, minor=0), None),
        ("6.2", SimpleNamespace(name="MI250X", gcnArchName="gfx90a:sramecc+"), "MI250X (gfx90a:sramecc+): take bf16"),
        ("6.2", SimpleNamespace(name="MI300X", gcnArchName="gfx942:sramecc+"), None),
    ],
)
def test_gpus_without_the_units_are_refused(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, device: SimpleNamespace, refused: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    if refused is None:
        refuse_fp8(torch.device("cuda"))
        return
    with pytest.raises(UserError) as error:
        refuse_fp8(torch.device("cuda"))
    assert str(error.value).endswith(f"this rank computes on {refused}")
