"""The pipeline runs every schedule as it is written, and computes what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_workers import left_over, run_schedules

from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Ledger
from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.pipeline import MOST_LEAVING, MicroBatch, Pipeline
from meshwright.schedule.orders import make_schedule
from meshwright.testing import run_distributed

SHAPES: dict[int, list[tuple[Any, ...]]] = {
    1: [("1f1b", 1, 3, 1), ("gpipe", 1, 3, 1), ("zb-h1", 1, 3, 1), ("interleaved", 1, 3, 2), ("dualpipe-v", 1, 3, 2, True)],
    2: [
        ("gpipe", 2, 3, 1),
        ("1f1b", 2, 1, 1),
        ("1f1b", 2, 5, 1),
        ("interleaved", 2, 4, 3),
        ("zb-h1", 2, 5, 1),
        ("zb-v", 2, 1, 2),
        ("zb-v", 2, 5, 2),
        ("dualpipe-v", 2, 6, 2),
        ("dualpipe-v", 2, 6, 2, True),
    ],
    4: [
        ("gpipe", 4, 5, 1),
        ("1f1b", 4, 7, 1),
        ("interleaved", 4, 8, 2),
        ("zb-h1", 4, 9, 1),
        ("zb-v", 4, 9, 2),
        ("dualpipe-v", 4, 9, 2),
        ("dualpipe-v", 4, 9, 2, True),
    ],
}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_schedule_computes_the_gradients_of_one_process(world: int) -> None:
    for rank, results in enumerate(run_distributed(run_schedules, world, SHAPES[world])):
        for shape, result in zip(SHAPES[world], results, strict=True):
            assert result["error"] < 1e-12, (shape, rank)
            assert result["loss"] == pytest.approx(result["expected"], rel=1e-12), (shape, rank)
            assert result["ran"] == result["planned"], (shape, rank)


def test_a_second_step_starts_afresh() -> None:
    for results in run_distributed(run_schedules, 2, [("zb-v", 2, 4, 2)], 3):
        assert results[0]["error"] < 1e-12


@pytest.mark.parametrize("shape", [("gpipe", 2, 24, 1), ("zb-v", 2, 24, 2), ("dualpipe-v", 2, 24, 2, True)])
def test_nothing_is_left_over_and_sent_tensors_do_not_pile_up(shape: tuple[Any, ...]) -> None:
    for held in run_distributed(left_over, 2, *shape):
        assert held.pop("leaving") <= MOST_LEAVING + 2
        assert set(held.values()) == {0}, held


def test_other_numbers_of_micro_batches_than_planned_are_refused() -> None:
    group = Group("pp", (0,), 0, None, Ledger())
    pipeline = Pipeline(
        [torch.nn.Identity()], make_schedule("1f1b", 1, 2), group, lambda x, y: x, (), torch.float32, WeightGradients()
    )
    with pytest.raises(ValueError, match="runs 2 micro-batches, got 1"):
        pipeline.run([MicroBatch(torch.zeros(1, 1), torch.zeros(1, 1))], torch.tensor(1.0))
