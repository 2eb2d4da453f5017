"""Every layout computes the gradients, losses and norms of one process, parameter by parameter."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import workers
from fixtures import CI_MODELS, CI_SPARSE, LAYOUTS, MODELS, MORE_LAYOUTS, SPARSE, SPARSE_LAYOUTS, WORKLOAD, cases

from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import parameters
from meshwright.testing import run_distributed

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}
STEPS = 50


@lru_cache
def one_process(model: Model, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    figures, gradients = run_distributed(workers.gradients_of_step_1, 1, model, WORKLOAD, parse_layout(f"mb1 {precision}"))[
        0
    ]
    return figures, {shard.name: gradient for shard, gradient in gradients}


@lru_cache
def one_process_losses(model: Model, precision: str) -> list[float]:
    return run_distributed(workers.losses, 1, model, WORKLOAD, parse_layout(f"mb4 {precision}"), STEPS)[0]


def scale_of(name: str, reference: dict[str, torch.Tensor], model: Model) -> float:
    """What an error in this parameter's gradient is relative to: its own largest element.

    But a key bias without rotary positions adds the same to every score of a query, which softmax does not see: its gradient
    is zero and what is computed is rounding. There the query bias of the same layer sets the scale.
    """
    if model.rope is None and name.endswith("qkv.k.bias"):
        name = name.replace("qkv.k", "qkv.q")
    return float(reference[name].abs().max())


@pytest.mark.parametrize(
    ("name", "layout", "precision"), cases(MODELS, CI_MODELS, LAYOUTS + MORE_LAYOUTS, ("fp64", "fp32"))
)
def test_gradients_of_step_1(name: str, layout: str, precision: str) -> None:
    check_gradients(MODELS[name], layout, precision)


@pytest.mark.parametrize(("name", "layout", "precision"), cases(SPARSE, CI_SPARSE, SPARSE_LAYOUTS, ("fp64", "fp32")))
def test_gradients_of_step_1_with_experts(name: str, layout: str, precision: str) -> None:
    check_gradients(SPARSE[name], layout, precision)


def check_gradients(model: Model, layout: str, precision: str) -> None:
    parsed = parse_layout(f"{layout} {precision}")
    figures, reference = one_process(model, precision)
    ranks = run_distributed(workers.gradients_of_step_1, parsed.world, model, WORKLOAD, parsed)
    seen = set()
    for rank_figures, gradients in ranks:
        assert rank_figures == pytest.approx(figures, rel=TOLERANCE[precision])
        for shard, gradient in gradients:
            error = (shard.of(reference[shard.name]) - gradient).abs().max() / scale_of(shard.name, reference, model)
            assert error <= TOLERANCE[precision], f"{shard.name}: relative error {error:.1e}"
            seen.add(shard.name)
    assert seen == {p.name for p in parameters(model)}


IN_CI = [(*(("few-kv-heads", "fp32") if at % 2 else ("tied", "fp64")), layout) for at, layout in enumerate(LAYOUTS)]
"""Both precisions and all three fixtures meet every layout in `make parity`; here each layout meets one of the pairs."""


@pytest.mark.parametrize(("name", "precision", "layout"), IN_CI)
def test_loss_after_50_steps(name: str, layout: str, precision: str) -> None:
    check_losses(name, layout, precision)


@pytest.mark.parity
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", ["few-kv-heads", "tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_after_50_steps_all(name: str, layout: str, precision: str) -> None:
    check_losses(name, layout, precision)


def check_losses(name: str, layout: str, precision: str) -> None:
    parsed = parse_layout(f"{layout} {precision}")
    reference = one_process_losses(MODELS[name], precision)
    assert reference[-1] < 0.9 * reference[0], "the reference must learn, or equal losses say nothing"
    for rank in run_distributed(workers.losses, parsed.world, MODELS[name], WORKLOAD, parsed, STEPS):
        assert rank == pytest.approx(reference, rel=TOLERANCE[precision])
