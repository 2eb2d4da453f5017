"""What is alive on a rank, counted, is what `estimate` says that it holds; a figure of each class in CI, the rest in `make parity`."""

from __future__ import annotations

from functools import lru_cache

import pytest

import memory_ranks
from memory import DENSE, GROUPS, LAYER_NORM, SPARSE, WORKLOAD, measure
from meshwright.cost.memory import in_flight_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.schedule.orders import layout_schedule
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed

QUICK = (
    ("zero", "dp2:zero1 mb1 bf16 grads:bf16"),
    ("hybrid", "dp4:zero3x2 mb2"),
    ("buffers", "dp4:zero2 mb2"),
    ("sequence", "tp2:sp mb2 fp32"),
    ("pipeline", "pp2:1f1b mb2 fp32"),
    ("context", "cp2:ulysses mb2 fp32"),
    ("experts", "dp2 ep2 mb2 bf16"),
)
RECOMPUTES = ("ac:norms", "ac:selective", "ac:activation", "ac:core+mlp:3", "ac:norms+mlp", "ac:full", "ac:full:1")


@lru_cache
def counted(model: Model, layout: Layout) -> list[memory_ranks.Held]:
    return run_distributed(memory_ranks.held, layout.world, model, WORKLOAD, layout)


def activations(model: Model, layout: Layout) -> int:
    """After forwards, as they are counted."""
    program = rank_program(model, layout, WORKLOAD, Place())
    schedule = layout_schedule(layout, micro_batches(layout, WORKLOAD))
    return in_flight_bytes(program.chunks, schedule, 0, layout)


@pytest.mark.parametrize(
    ("group", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else [pytest.mark.parity])
        for name, group in GROUPS.items()
        for layout in group.layouts
    ],
)
def test_a_rank_holds_what_the_estimate_says(group: str, layout: str) -> None:
    one = GROUPS[group]
    for row in measure(one, counted, (layout,)):
        assert abs(row.error) < 0.02
        if one.what == "kept":
            assert row.counted == row.estimated


@pytest.mark.parametrize(
    ("split", "model", "recompute"),
    [
        pytest.param(split, model, mode, id=f"{split}-{model.name}-{mode}", marks=[] if quick else [pytest.mark.parity])
        for split in ("mb2 fp32", "tp2:sp mb2 bf16", "tp2 mb2 fp32", "tp2:async mb2 fp32")
        for model in (DENSE, LAYER_NORM, SPARSE)
        for mode in RECOMPUTES
        for quick in [split == "mb2 fp32" and (model is DENSE or mode in ("ac:activation", "ac:norms+mlp"))]
    ],
)
def test_recompute_saves_what_the_estimate_says(split: str, model: Model, recompute: str) -> None:
    """Against the same layout without, so that what both keep beside it cannot hide an error."""
    plain, again = parse_layout(split), parse_layout(f"{split} {recompute}")
    less = activations(model, plain) - activations(model, again)
    assert less > 0
    for a, b in zip(counted(model, plain), counted(model, again), strict=True):
        assert a.activations - b.activations == pytest.approx(less, rel=0.01)


def test_the_quick_cases_are_cases() -> None:
    assert all(layout in GROUPS[name].layouts for name, layout in QUICK)
    assert {name for name, _ in QUICK} == {name for name in GROUPS if "recompute" not in name}
