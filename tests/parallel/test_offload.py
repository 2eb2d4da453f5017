"""State that waits on the host or in files: a run with it equals one without to the bit."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import state_workers
import torch
from fixtures import MODELS, SPARSE, WORKLOAD

from meshwright.cost.memory import away_bytes, state_bytes
from meshwright.cost.offload import away
from meshwright.cost.program import Place, rank_program
from meshwright.cost.units import unit_buffer_bytes
from meshwright.parallel.offload import Offload
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import run_distributed

CASES = [
    ("untied", "mb2 fp32", "optimizer@file"),
    ("tied", "dp2:zero1 tp2:sp mb2 bf16", "optimizer"),
    ("tied", "dp2:zero3 pp2 mb1 bf16", "all@file"),
    ("few-kv-heads", "dp4:zero3 mb1 fp32", "all"),
    ("gpt2-like", "dp2:zero2 mb1 bf16 grads:bf16", "optimizer@file"),
    ("untied", "dp2:zero3 mb1 bf16 params:fp32 ac:full", "all@file"),
    ("tied", "dp2 pp2x2:interleaved mb1 fp32", "optimizer"),
    ("qk-norm", "dp4:zero3x2 mb1 bf16", "all"),
    ("gpt2-like", "dp2:zero3 pp2x2:zb-v mb1 bf16", "all@file"),
    ("untied", "dp2:zero3 tp2:sp mb2 fp64", "optimizer@file"),
    ("gpt-oss-like", "dp4:zero3x2 ep4 mb2 bf16", "all@file"),
    ("deepseek-v3-like", "dp2:zero3 tp2 ep4 mb2 bf16", "all"),
]
"""(model, layout, what is offloaded); the expert weights of the last two are whole on every rank, and kept away all the same."""
IN_CI = 4


def cases() -> list[Any]:
    return [pytest.param(*case, marks=[] if i < IN_CI else [pytest.mark.parity]) for i, case in enumerate(CASES)]


def trained(name: str, layout: str, directory: Path | None = None) -> list[dict[str, Any]]:
    parsed = parse_layout(layout)
    return run_distributed(state_workers.trained, parsed.world, (MODELS | SPARSE)[name], WORKLOAD, parsed, directory)


@pytest.mark.parametrize(("name", "layout", "offload"), cases())
def test_offload_changes_nothing(tmp_path: Path, name: str, layout: str, offload: str) -> None:
    """Losses, weights and moments of some AdamW steps; and what is kept away and moved is what is predicted."""
    offloaded = f"{layout} offload:{offload}"
    for expected, rank in zip(trained(name, layout), trained(name, offloaded, tmp_path / "state"), strict=True):
        assert rank["losses"] == expected["losses"]
        for one, other in zip(expected["state"], rank["state"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        check_bytes((MODELS | SPARSE)[name], parse_layout(offloaded), rank)
    assert not list((tmp_path / "state").glob("*")), "the files are scratch: nothing may stay, however a run ends"


def check_bytes(model: Model, layout: Layout, rank: dict[str, Any]) -> None:
    """What stays, what is kept away, the buffers it passes through (a few buckets), and what is moved in a step."""
    program = rank_program(model, layout, WORKLOAD, Place(rank["stage"], *rank["seat"]))
    assert rank["resident"] | {"offload": rank["working"]} == state_bytes(program, layout)
    assert away_bytes(program, layout) == {"file" if layout.offload_to == "file" else "host": rank["kept"]}
    assert rank["files"] == (rank["kept"] if layout.offload_to == "file" else 0)
    if layout.precision == "bf16" and layout.gradient_dtype is None:  # else gradients on their way share the buffers
        assert rank["units"] == unit_buffer_bytes(program, layout)
    predicted = away(program, layout)
    assert rank["moved"] == {"read": predicted.read(micro_batches(layout, WORKLOAD)), "written": predicted.written}


@pytest.mark.parametrize(
    "layout", ["dp2:zero1 mb2 bf16 params:fp32", "pp2 mb2 bf16 params:fp32", "dp2:zero3 pp2x2:interleaved mb1 bf16"]
)
def test_buffers_of_units_are_predicted(layout: str) -> None:
    parsed = parse_layout(layout)
    for rank in trained("untied", layout):
        program = rank_program(MODELS["untied"], parsed, WORKLOAD, Place(rank["stage"], *rank["seat"]))
        assert rank["units"] == unit_buffer_bytes(program, parsed) > 0


def test_reads_run_ahead_and_writes_behind() -> None:
    """Of the optimizer's state and, in forward and backward, of the parameters."""
    for events in run_distributed(
        state_workers.moves, 2, MODELS["tied"], WORKLOAD, parse_layout("dp2:zero3 mb4 offload:all")
    ):
        update = [event for event in events if event[0] in ("update", "read optimizer", "write optimizer")]
        last = max(index for _, index in update)
        assert last >= 5
        for index in range(last):
            begun = update.index(("update", index))
            assert update.index(("read optimizer", index + 1)) < begun, "the next bucket is on its way"
            assert update.index(("write optimizer", index)) < update.index(("update", index + 1))
            if index + 2 <= last:
                assert update.index(("read optimizer", index + 2)) > begun, "and no more than that"
        forward = [event for event in events if event[0] in ("bring", "read unit")]
        assert forward[:4] == [("read unit", 0), ("bring", 0), ("read unit", 1), ("read unit", 2)], forward[:6]
        for unit in (2, 3, 4):
            assert forward.index(("read unit", unit)) < forward.index(("bring", unit - 1))


def test_files_take_their_space_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where another program has taken what was free: in one line, and nothing stays."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    offload = Offload("file", torch.device("cpu"), 3, tmp_path)
    with pytest.raises(
        UserError, match=r"^offload needs 4,096 bytes in .*rank-00003-state.bin: No space left on device; try "
    ):
        offload.record("state", (2, 512), torch.float32)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken/x: Not a directory; try another with --offload-dir$"):
        Offload("file", torch.device("cpu"), 0, tmp_path / "taken/x")
