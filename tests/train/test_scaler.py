"""fp16: the loss scale falls when gradients overflow, on all ranks together, and the run ends with one line where none fits."""

from __future__ import annotations

import math

import pytest
import train_workers

from meshwright.spec.errors import UserError
from meshwright.testing import run_distributed
from meshwright.train.scaler import FIRST_SCALE, GROWTH_INTERVAL, SMALLEST_SCALE, LossScaler


def test_other_precisions_are_not_scaled() -> None:
    scaler = LossScaler("bf16")
    assert scaler.scale == 1.0
    assert scaler.accepts(math.inf), "what is not finite then is the loop's to refuse"


def test_an_overflow_halves_the_scale_and_skips_the_step() -> None:
    scaler = LossScaler("fp16")
    assert not scaler.accepts(math.inf)
    assert not scaler.accepts(math.nan)
    assert scaler.scale == FIRST_SCALE / 4
    assert scaler.accepts(1.0)
    assert scaler.scale == FIRST_SCALE / 4


def test_the_scale_grows_after_many_good_steps_in_a_row() -> None:
    scaler = LossScaler("fp16")
    for _ in range(GROWTH_INTERVAL - 1):
        assert scaler.accepts(1.0)
    assert not scaler.accepts(math.inf)
    for _ in range(GROWTH_INTERVAL - 1):
        assert scaler.accepts(1.0)
    assert scaler.scale == FIRST_SCALE / 2
    assert scaler.accepts(1.0)
    assert scaler.scale == FIRST_SCALE


def test_a_scale_that_is_never_found_is_refused() -> None:
    scaler = LossScaler("fp16")
    while scaler.scale > SMALLEST_SCALE:
        assert not scaler.accepts(math.inf)
    with pytest.raises(UserError, match=r"overflow at a loss scale of 1 too: .* try bf16"):
        scaler.accepts(math.inf)


@pytest.mark.parametrize("layout", ["dp2 fp16", "dp2:zero2 fp16", "dp2:zero3 fp16"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(layout: str) -> None:
    assert run_distributed(train_workers.accepted_steps, 2, layout) == [[False, True]] * 2
