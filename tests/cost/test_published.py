"""Published runs: a row of measurements becomes a model, a cluster, a layout and a practice, and nothing in it can end the run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from collectives import cases, measured_seconds, scored
from fit import get, put, start
from meshwright.spec.errors import UserError
from published import COLUMNS, Predictor, main
from rows import find_accelerator, read_cluster, read_run

ROW = {
    "id": "a",
    "year": "2025",
    "workload": "pretrain",
    "model_name": "Llama-3.1-70B",
    "params_b": "70",
    "layers": "80",
    "hidden": "8192",
    "ffn_hidden": "28672",
    "heads": "64",
    "kv_heads": "8",
    "head_dim": "128",
    "vocab": "128256",
    "seq_len": "8192",
    "gated_mlp": "yes",
    "gpu": "H100-80GB-SXM",
    "n_gpus": "64",
    "tp": "4",
    "sp": "yes",
    "cp": "2",
    "pp": "4",
    "vpp": "5",
    "zero_stage": "1 (distributed optimizer)",
    "micro_batch": "1",
    "global_batch": "128",
    "precision": "bf16",
    "attention_kernel": "flash (TE/cuDNN fused)",
    "recompute": "none",
    "other_flags": "tp_comm_overlap (userbuffers); grad/param overlap",
}
"""NVIDIA dgxc-benchmarking v25.02, llama3.1/README_70b.md: 14.6 s a step."""
ODD = ("", "abc", "0", "-1", "3", "1e9", "nan", "inf")


def test_a_row_becomes_a_layout_and_a_practice() -> None:
    run = read_run(ROW)
    assert str(run.layout) == "dp2:zero1 tp4:sp pp4x5:interleaved cp2:ring mb1 bf16"
    assert (run.cluster.accelerator.name, run.cluster.node.nics * run.cluster.node.nic_bandwidth) == ("h100-sxm", 400e9)
    assert not run.model.tied
    practice = run.practice
    assert (practice.overlaps_tensor, practice.overlaps_gradients, practice.overlaps_gathers) == (True, True, True)
    assert (practice.loss, practice.products, practice.attention, practice.frozen) == ("parallel", None, "flash", False)


def test_the_prediction_is_near_what_was_measured() -> None:
    found = Predictor().predict(ROW)
    assert float(found["step_time_s"]) == pytest.approx(14.6, rel=0.12)
    assert (found["fits"], found["reason"]) == ("yes", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero_stage": "FSDP=16 (ZeRO-3) x DP=4", "tp": "1", "pp": "1", "cp": "1", "sp": "no"}, "dp64:zero3x16 mb1 bf16"),
        ({"zero_stage": "0 (DDP)"}, "dp2 tp4:sp pp4x5:interleaved cp2:ring mb1 bf16"),
        ({"n_gpus": "32", "cp": "1", "vpp": "", "recompute": "full"}, "dp2:zero1 tp4:sp pp4:1f1b mb1 ac:full bf16"),
        ({"precision": "fp16 mixed", "n_gpus": "32", "cp": "1", "vpp": ""}, "dp2:zero1 tp4:sp pp4:1f1b mb1 fp16"),
    ],
)
def test_columns_say_how_it_is_split(changes: dict[str, str], said: str) -> None:
    assert str(read_run(ROW | changes).layout) == said


def test_code_that_names_no_framework_cuts_modules_not_layers() -> None:
    plain = ROW | {"zero_stage": "", "other_flags": "", "vpp": "", "year": "2023", "cp": "1", "pp": "4", "n_gpus": "32"}
    run = read_run(plain)
    # 80 layers, embedding, norm and head: 83 modules over four stages.
    assert run.layout.stage_layers == (20, 21, 21, 18)
    assert (run.practice.loss, run.practice.whole_gradients, run.practice.fragments) == ("whole", True, True)
    assert read_run(plain | {"schedule": "1F1B"}).layout.stage_layers is None
    # With as many stages as that, the last would hold no layer at all.
    assert read_run(plain | {"layers": "30", "pp": "16", "n_gpus": "128", "params_b": ""}).layout.stage_layers is None


def test_attention_tells_how_old_the_software_is() -> None:
    old = ROW | {"attention_kernel": "unfused (fused softmax)", "gated_mlp": "no", "ffn_hidden": "", "other_flags": ""}
    run = read_run(old)
    assert (run.practice.attention, run.model.rope) == ("fused-softmax", False)
    assert not run.practice.overlaps_gradients
    assert not run.practice.overlaps_gathers
    assert read_run(old | {"attention_kernel": "flash"}).practice.overlaps_gradients
    assert read_run(old | {"attention_kernel": "flash"}).model.rope
    # 64 heads over 32 ranks are two maps for each, of which the fused softmax takes four at a time.
    few = old | {"tp": "32", "kv_heads": "64", "n_gpus": "512"}
    assert read_run(few).practice.attention == "unfused"
    assert read_run(few | {"micro_batch": "2"}).practice.attention == "fused-softmax"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("H100-80GB-SXM", "h100-sxm"),
        ("A100", "a100-sxm-80"),
        ("A100-40GB", "a100-sxm-40"),
        ("H200-141GB", "h200-sxm"),
        ("B200-180GB", "b200-sxm"),
        ("GB200", "gb200"),
        ("MI300X-192GB-OAM", "mi300x"),
        ("V100-32GB-SXM2", "v100-sxm2-32"),
        ("H100-PCIe-80GB", "h100-pcie"),
    ],
)
def test_accelerators_are_known_by_their_names(gpu: str, name: str) -> None:
    assert find_accelerator(gpu).name == name


def test_an_unknown_accelerator_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="'Z900' is not in the catalogue"):
        find_accelerator("Z900")
    assert "'Z900'" in Predictor().predict(ROW | {"gpu": "Z900"})["reason"]


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("8x HDR InfiniBand 200 Gb/s per node", 200e9),
        ("1600 Gbps/node RoCE", 200e9),
        ("NDR InfiniBand", 400e9),
        ("3.2 Tbps/node EFA", 400e9),
        ("", 400e9),
    ],
)
def test_networks_are_read_from_words(text: str, bytes_: float) -> None:
    node = read_cluster(ROW | {"interconnect_inter": text}).node
    assert node.nics * node.nic_bandwidth == pytest.approx(bytes_)


@pytest.mark.parametrize("column", [name for name in ROW if name != "id"])
def test_no_value_of_a_column_ends_the_run(column: str) -> None:
    predictor = Predictor()
    for value in ODD:
        found = predictor.predict(ROW | {column: value})
        assert bool(found["step_time_s"]) != bool(found["reason"])
    assert Predictor().predict({"id": "empty"})["reason"]


def test_the_command_writes_a_line_for_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "predictions.csv"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([ROW, ROW | {"id": "b", "hidden": ""}])
    monkeypatch.setattr(sys, "argv", ["published.py", str(rows), str(out)])
    assert main() == 0
    with out.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == COLUMNS
    assert (first["id"], first["fits"], second["id"], second["reason"]) == ("a", "yes", "b", "hidden is blank")


def test_the_fit_moves_constants_by_name() -> None:
    for name in ("passes", "attention.flash.forward", "score_passes.unfused"):
        assert get(put(start(), name, 0.5), name) == 0.5


def test_collectives_are_scored_by_accelerator_and_operation() -> None:
    row = {"n_gpus": "8", "n_nodes": "1", "op": "all_gather", "gpu": "H100-80GB-SXM", "message_bytes": str(2**29)}
    row |= {"latency_us": "1400", "tool": "nccl-tests, NCCL 2.27", "busbw_gbytes_s": "", "calc_busbw_gbytes_s": ""}
    ((key, error),) = scored(cases([row, row], every=False))
    assert key == ("H100-80GB-SXM", "all_gather", True)
    assert abs(error) < 0.1
    by_rate = row | {"latency_us": "", "busbw_gbytes_s": "335.5"}
    assert measured_seconds(by_rate, 8) == pytest.approx(1400e-6, rel=0.01)
