"""Save under one layout, resume under any other: the run goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import train_workers
from fixtures import MODELS, SPARSE, WORKLOAD
from hypothesis import given
from hypothesis import strategies as st

from meshwright.spec.errors import UserError
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import RankError, run_distributed
from meshwright.train.checkpoint import flat_boxes, newest_checkpoint, read_about

PAIRS = (
    ("mb4", "dp2 tp2:sp pp2 mb2"),
    ("dp2 tp2:sp pp2 mb2", "dp4:zero1 mb2"),
    ("dp4:zero1 mb2", "tp2 pp2 mb2"),
    ("tp2 pp2 mb2", "dp2:zero1 pp2 mb1"),
    ("dp2:zero1 tp2 mb2", "mb4"),
)

OFFLOADED = [
    ("dp2:zero1 mb2", "dp2:zero3 mb2 offload:all@file"),
    ("dp2:zero3 mb1 offload:all", "tp2 mb4 offload:optimizer@file"),
]

SPARSE_PAIRS = [("dp2 ep2 mb2", "dp2:zero3 tp2 etp2 mb2"), ("dp4:zero3x2 ep4 mb1", "pp2x2:zb-v mb2")]


@pytest.mark.parametrize("model", ["tied", "few-kv-heads"])
@pytest.mark.parametrize(
    ("before", "after"),
    [*PAIRS, ("dp4:zero3x2 mb1", "cp2 tp2 mb2"), ("pp2x2:interleaved mb2", "dp2:zero2 mb2"), *OFFLOADED],
)
def test_resume_under_another_layout(tmp_path: Path, model: str, before: str, after: str) -> None:
    check_resume(tmp_path, MODELS[model], before, after)


@pytest.mark.parametrize(("before", "after"), SPARSE_PAIRS)
def test_resume_with_experts(tmp_path: Path, before: str, after: str) -> None:
    check_resume(tmp_path, SPARSE["gpt-oss-like"], before, after)


def check_resume(tmp_path: Path, model: Model, before: str, after: str) -> None:
    def run(function, layout: str, until: int) -> list[float]:
        parsed = parse_layout(f"{layout} fp64")
        return run_distributed(function, parsed.world, model, WORKLOAD, parsed, tmp_path, until)[0]

    whole = run(train_workers.train_and_save, "mb4", 8)
    first = run(train_workers.train_and_save, before, 4)
    newest_checkpoint(tmp_path).rename(tmp_path / "later")  # the uninterrupted run's
    rest = run(train_workers.resume, after, 8)
    assert first + rest == pytest.approx(whole, rel=1e-10)


def test_bf16_keeps_its_master_weights(tmp_path: Path) -> None:
    layouts = [parse_layout(text) for text in ("dp2:zero1 mb2 bf16", "dp2 mb2 bf16")]
    whole = run_distributed(train_workers.train_and_save, 2, MODELS["untied"], WORKLOAD, layouts[0], tmp_path / "a", 6)[0]
    run_distributed(train_workers.train_and_save, 2, MODELS["untied"], WORKLOAD, layouts[0], tmp_path / "b", 3)
    rest = run_distributed(train_workers.resume, 2, MODELS["untied"], WORKLOAD, layouts[1], tmp_path / "b", 6)[0]
    assert rest == pytest.approx(whole[3:], rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [("", " offload:all@file"), (" offload:all", "")])
def test_with_and_without_offload_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, before: str, after: str) -> None:
    plain, first, second = (parse_layout(f"dp2:zero3 mb2 bf16{offload}") for offload in ("", before, after))
    whole = run_distributed(train_workers.train_and_save, 2, MODELS["tied"], WORKLOAD, plain, tmp_path / "a", 6)[0]
    run_distributed(train_workers.train_and_save, 2, MODELS["tied"], WORKLOAD, first, tmp_path / "b", 3)
    assert run_distributed(train_workers.resume, 2, MODELS["tied"], WORKLOAD, second, tmp_path / "b", 6)[0] == whole[3:]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    layout = parse_layout("mb4 fp32")
    run_distributed(train_workers.train_and_save, 1, MODELS["tied"], WORKLOAD, layout, tmp_path, 1)
    with pytest.raises(RankError, match=r"is of another model: model\.head\.weight has shape None"):
        run_distributed(train_workers.resume, 1, MODELS["untied"], WORKLOAD, layout, tmp_path, 2)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a Meshwright checkpoint"):
        read_about(tmp_path)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_flat_ranges_are_boxes(shape: list[int], data: st.DataObject) -> None:
    """The boxes of a flat range hold its elements, each once and in order, as contiguous memory."""
    whole = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    end = data.draw(st.integers(start, whole.size))
    found = []
    for offsets, sizes, at in flat_boxes(tuple(shape), start, end):
        box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].ravel()
        assert box[0] == at
        found += box.tolist()
    assert found == list(range(start, end))
