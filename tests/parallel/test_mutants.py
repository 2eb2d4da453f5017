"""Each collective and each scaling factor is needed: without it, gradients, loss, norm or the next steps come out wrong."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import workers
from fixtures import MODELS, WORKLOAD
from mutants import MUTANTS, Mutant, run_mutant

from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed

TOLERANCE = 1e-10


@lru_cache
def reference(name: str) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    figures, gradients, losses = run_distributed(run_mutant, 1, None, MODELS[name], WORKLOAD, parse_layout("mb4 fp64"))[0]
    return figures, {shard.name: gradient for shard, gradient in gradients}, losses


def notices(mutant: Mutant | None, name: str, layout: str) -> bool:
    """Whether any rank's figures differ from those of one process."""
    figures, gradients, losses = reference(name)
    parsed = parse_layout(f"{layout} fp64")
    for rank_figures, rank_gradients, rank_losses in run_distributed(
        run_mutant, parsed.world, mutant, MODELS[name], WORKLOAD, parsed
    ):
        if rank_figures != pytest.approx(figures, rel=TOLERANCE) or rank_losses != pytest.approx(losses, rel=TOLERANCE):
            return True
        for shard, gradient in rank_gradients:
            whole = shard.of(gradients[shard.name])
            if not (whole - gradient).abs().max() <= TOLERANCE * gradients[shard.name].abs().max():
                return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    assert notices(mutant, mutant.model, mutant.layout)


@pytest.mark.parametrize(("name", "layout"), sorted({(m.model, m.layout) for m in MUTANTS}))
def test_the_engine_itself_is_not(name: str, layout: str) -> None:
    assert not notices(None, name, layout)
