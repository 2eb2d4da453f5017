"""Published memory figures: each is held against what its counter could see, and no row can end the run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from memory_published import counted, main, peak_bytes, score, table
from meshwright.spec.errors import UserError
from rows import read_run

LLAMA = {
    "id": "a",
    "source": "ml-engineering",
    "year": "2025",
    "model_name": "Llama-3.1-8B",
    "params_b": "8",
    "layers": "32",
    "hidden": "4096",
    "ffn_hidden": "14336",
    "heads": "32",
    "kv_heads": "8",
    "vocab": "128256",
    "gated_mlp": "yes",
    "seq_len": "65536",
    "gpu": "H200-141GB",
    "n_gpus": "8",
    "dp": "8",
    "zero_stage": "3 (DeepSpeed)",
    "micro_batch": "1",
    "global_batch": "8",
    "precision": "bf16",
    "attention_kernel": "flash",
    "recompute": "full",
    "other_flags": "Liger-Kernel; CPU AdamW offload",
    "mem_gib_per_gpu": "37.5",
    "mem_kind": "peak reserved (torch), worst rank",
}
"""stas00/ml-engineering, H200: 37.5 GiB."""


def test_a_long_sequence_with_a_chunked_loss_and_an_offloaded_optimizer_is_near_what_was_measured() -> None:
    assert score(LLAMA).error == pytest.approx(0, abs=0.08)
    assert score(LLAMA | {"other_flags": "without Liger-Kernel; CPU AdamW offload"}).error > 1
    assert score(LLAMA | {"other_flags": "Liger-Kernel"}).predicted > score(LLAMA).predicted


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("device usage as printed (nvidia-smi class), GB read as GiB", "driver"),
        ("peak reserved (torch), worst rank", "reserved"),
        ("peak allocated (torch)", "allocated"),
        ("peak as printed", "allocated"),
        ("allocated after loading, printed in GB", "weights"),
    ],
)
def test_what_is_counted_depends_on_who_counts(kind: str, who: str) -> None:
    assert counted({"mem_kind": kind}) == who


def test_only_a_driver_sees_the_overhead_and_only_weights_are_there_after_loading() -> None:
    run = read_run(LLAMA)
    assert peak_bytes(run, "driver", LLAMA) > peak_bytes(run, "allocated", LLAMA) + 2**30
    loaded = score(LLAMA | {"zero_stage": "0", "n_gpus": "1", "dp": "1", "mem_kind": "allocated after loading"})
    assert loaded.predicted == pytest.approx(8.03e9 * 2, rel=0.01)


def test_gradients_that_are_added_up_in_fp32_take_four_bytes_more() -> None:
    plain = LLAMA | {"zero_stage": "1", "other_flags": "", "seq_len": "2048"}
    wide = plain | {"other_flags": "fp32 grad accumulation (BF16 optimizer)"}
    assert score(wide).predicted - score(plain).predicted == pytest.approx(8.03e9 * 4, rel=0.01)


def test_a_row_without_a_figure_is_skipped_with_its_reason() -> None:
    with pytest.raises(UserError, match="not a number"):
        score(LLAMA | {"mem_gib_per_gpu": ""})


def test_the_command_prints_a_line_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, LLAMA)
        writer.writeheader()
        writer.writerows([LLAMA, LLAMA | {"id": "b", "hidden": ""}])
    monkeypatch.setattr(sys, "argv", ["memory_published.py", str(rows), "--rows"])
    assert main() == 0
    said = capsys.readouterr()
    assert "| ml-engineering | reserved | 1 |" in said.out
    assert "1 of 2 rows" in said.out
    assert "skipped 1: hidden is blank" in said.err
    assert table([]) == []
