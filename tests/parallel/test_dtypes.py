"""Parameters and gradients in dtypes of their own: what can be equal to the bit, is.

Rounding makes a half-precision run differ from layout to layout, so a layout is held against the same layout with the usual dtypes,
whose gradients `test_parity.py` proves in fp32 and fp64.
"""

from __future__ import annotations

import pytest
import state_workers
import torch
import workers
from fixtures import MODELS, SPARSE, WORKLOAD

from meshwright.parallel.data import squared_norm
from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed

CASES = [
    ("tied", "dp2:zero1 tp2:sp mb2"),
    ("untied", "dp2:zero3 pp2 mb1"),
    ("few-kv-heads", "tp2 pp2 mb2 ac:full"),
    ("gpt2-like", "dp2:zero2 mb2"),
    ("tied", "dp2:zero3 mb2 ac:selective"),
    ("gpt-oss-like", "dp4:zero3x2 ep4 mb2"),
    ("deepseek-v3-like", "tp2:sp ep2 pp2x2:zb-v mb2"),
]
IN_CI = CASES[:2]
EVERY = [pytest.param(*case, marks=[] if case in IN_CI else [pytest.mark.parity]) for case in CASES]


@pytest.mark.parametrize(("name", "layout"), EVERY)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.parity)])
def test_parameters_kept_in_fp32_are_the_master_weights(name: str, layout: str, precision: str) -> None:
    """From weights that the narrow dtype holds exactly, the cast of fp32 parameters is what is kept beside a master copy."""
    model = (MODELS | SPARSE)[name]
    usual, kept = (parse_layout(f"{layout} {precision}{dtypes}") for dtypes in ("", " params:fp32"))
    expected = run_distributed(state_workers.losses_from_rounded, usual.world, model, WORKLOAD, usual)
    assert run_distributed(state_workers.losses_from_rounded, kept.world, model, WORKLOAD, kept) == expected
    assert len({loss for losses in expected for loss in losses if loss}) >= state_workers.STEPS, "the weights must move"


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.parity)])
@pytest.mark.parametrize("layout", ["mb8", pytest.param("tp2:sp mb8", marks=pytest.mark.parity)])
def test_one_narrow_gradient_is_exact(layout: str, precision: str) -> None:
    """Nothing is added up: the product of half-precision factors comes out in half precision, whatever it is kept in."""
    usual, narrow = (parse_layout(f"{layout} {precision}{dtypes}") for dtypes in ("", f" grads:{precision}"))
    for (figures, gradients), (narrow_figures, narrow_gradients) in zip(
        run_distributed(workers.gradients_of_step_1, usual.world, MODELS["untied"], WORKLOAD, usual),
        run_distributed(workers.gradients_of_step_1, narrow.world, MODELS["untied"], WORKLOAD, narrow),
        strict=True,
    ):
        assert narrow_figures[0] == figures[0]
        for (shard, gradient), (_, narrow_gradient) in zip(gradients, narrow_gradients, strict=True):
            assert narrow_gradient.element_size() == 2
            if not shard.partial:  # those are summed over tp
                assert torch.equal(narrow_gradient.float(), gradient), shard.name


@pytest.mark.parametrize(
    ("name", "layout"), [("untied", "dp2:zero2 mb1"), ("tied", "dp2:zero1 pp2 mb2"), ("gpt2-like", "dp4 mb1")]
)
def test_sums_of_narrow_gradients_are_off_by_their_rounding(name: str, layout: str) -> None:
    """bf16 keeps 8 bits: an addition rounds by 2^-9 of its result, here at most twice the largest element of the whole sum."""
    usual, narrow = (parse_layout(f"{layout} {dtypes}") for dtypes in ("bf16", "bf16 grads:bf16"))
    additions = WORKLOAD.global_batch // usual.micro_batch
    ranks = (
        run_distributed(workers.gradients_of_step_1, each.world, MODELS[name], WORKLOAD, each) for each in (usual, narrow)
    )
    differ = False
    for (figures, gradients), (narrow_figures, narrow_gradients) in zip(*ranks, strict=True):
        assert narrow_figures == pytest.approx(figures, rel=additions * 2**-8)
        for (shard, gradient), (_, narrow_gradient) in zip(gradients, narrow_gradients, strict=True):
            error = (narrow_gradient.float() - gradient).abs().max()
            assert error <= additions * 2**-8 * gradient.abs().max(), shard.name
            differ |= bool(error > 0)
    assert differ, "the gradients were not summed in bf16"


def test_the_norm_of_a_long_vector_is_as_exact_as_of_a_short_one() -> None:
    """In one go PyTorch's is off by 2e-5 here, and by more the longer the vector is."""
    flat = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    exact = flat.double().square().sum()
    torch.testing.assert_close(squared_norm(flat, torch.float32), exact, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(squared_norm(flat[:5], torch.float32), flat[:5].double().square().sum(), rtol=1e-6, atol=0.0)
