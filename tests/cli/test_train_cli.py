"""`meshwright train` and `compare` from end to end, and what a person sees when the input is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshwright.cli.main import main
from meshwright.cost.memory import away_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.spec.huggingface import load_model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload

SMALL = ["--model", "llama-tiny", "--seq", "32", "--global-batch", "4", "--steps", "4", "--warmup", "1"]


def meshwright(*arguments: str, directory: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "meshwright", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the mesh is wrought of ranks and the ranks are wrought of threads\n" * 200)
    return path


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_train_resume_compare(tmp_path: Path, text: Path) -> None:
    """One run in one process; the same run in two halves under other layouts, the second under torchrun; then the table."""
    common = [*SMALL, "--data", str(text)]
    alone = meshwright(
        "train", *common, "--layout", "mb4 fp32", "--out", "alone", "--json-log", "alone.jsonl", directory=tmp_path
    )
    assert alone.returncode == 0, alone.stderr
    whole = losses(tmp_path / "alone.jsonl")
    assert len(whole) == 4
    assert whole[-1] < whole[0]

    split = [*common, "--out", "split"]
    first = meshwright("train", *split, "--save-every", "2", "--layout", "dp2:zero1 tp2:sp mb2 fp32", directory=tmp_path)
    assert first.returncode == 0, first.stderr
    assert losses(tmp_path / "split/metrics.jsonl") == pytest.approx(whole, rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "split/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert (tmp_path / "split/loss.png").stat().st_size > 1000

    longer = [*split, "--steps", "6", "--resume", "--layout", "pp2 mb2 fp32", "--export", "weights"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    second = meshwright("train", *longer, directory=tmp_path, launcher=torchrun)
    assert second.returncode == 0, second.stderr
    resumed = losses(tmp_path / "split/metrics.jsonl")
    assert resumed[:4] == pytest.approx(whole, rel=1e-5)
    assert len(resumed) == 6

    again = meshwright("train", *common, "--init", "weights", "--layout", "mb4 fp32", "--out", "again", directory=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again/metrics.jsonl")[0] < whole[0], "what was exported has been trained"

    table = meshwright("compare", "alone", "split", "--cluster", "local", "--json", directory=tmp_path)
    assert table.returncode == 0, table.stderr
    rows = json.loads(table.stdout)
    counted = [row for row in rows if row["unit"] == "B"]
    assert len(counted) >= 6
    assert all(row["error"] == 0 for row in counted)


def test_a_recipe_and_its_overrides(tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: llama-tiny\nlayout: mb2 bf16\nseq: 32\nglobal_batch: 4\nsteps: 3\nwarmup: 1\ndata: {text}\nout: run\n"
    )
    done = meshwright("train", str(recipe), "--steps", "2", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run/metrics.jsonl")) == 2
    other_data = tmp_path / "other.txt"
    other_data.write_text("something else entirely " * 400)
    refused = meshwright("train", str(recipe), "--resume", "--data", str(other_data), directory=tmp_path)
    assert refused.returncode == 2
    assert "its place in the data would be lost" in refused.stderr


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    monkeypatch.setattr(sys, "argv", ["meshwright", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "dp3 mb1"], "does not divide 8"),
        (["--layout", "tp3 mb1"], "tp 3 does not divide the 8 attention heads of llama-tiny: legal tp: 1, 2, 4, 8"),
        (["--layout", "pp5 mb1"], "llama-tiny has 4 layers, fewer than the 5 stages of pp5"),
        (["--layout", "tp0"], "tp must be at least 1, got 0"),
        (["--layout", "tp2:xx"], "layout token 'tp2:xx' is not understood"),
        (["--layout", "dp2 mb1 fp8"], "this rank computes on the CPU: take bf16"),
        (
            ["--layout", "dp2 mb1 fp4"],
            "precision fp4 can be priced and planned, not yet run: legal: fp64, fp32, bf16, fp16, fp8",
        ),
        (["--layout", "cp2:ring ac:selective mb1"], "would change nothing under ring attention"),
        (["--layout", "dp2 mb3"], "does not divide 8"),
        (["--model", "llama-tinny"], "unknown model 'llama-tinny': did you mean llama-tiny"),
        (["--model", "llama-3-405b"], "llama-3-405b under mb1 fp32 keeps up to 6,047.7 GiB"),
        (["--cluster", "h1000"], "unknown cluster 'h1000'"),
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--lr", "-1"], "lr"),
        (["--offload-dir", "d"], "offload_dir d would not be used: mb1 fp32 keeps nothing in files"),
        (["--layout", "mb1 offload:all"], "offload:all keeps parameters away between uses, which is ZeRO-3's: got zero0"),
        (["--resume"], "nothing to resume"),
        (["--init", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(monkeypatch, capsys, "train", *arguments)


def test_offload_without_space_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = ["--layout", "dp2 mb1 bf16 offload:optimizer@file"]
    program = rank_program(load_model("llama-tiny"), parse_layout(layout[1]), Workload(256, 8), Place())
    needed = 2 * away_bytes(program, parse_layout(layout[1]))["file"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    said = refusal(monkeypatch, capsys, "train", *layout, "--offload-dir", "fast/drive")
    assert said == (
        f"error: offload needs {needed:,} bytes in fast/drive for 2 ranks, but {needed - 1:,} are free: "
        "try another directory with --offload-dir, or keep it in memory with offload:optimizer@cpu"
    )
    (tmp_path / "taken").write_text("")
    assert "is not a directory that can be written" in refusal(
        monkeypatch, capsys, "train", *layout, "--offload-dir", "taken/x"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"], "nothing was started"


def test_a_run_that_offloads_to_files(tmp_path: Path, text: Path) -> None:
    layout = "mb4 bf16 offload:optimizer@file"
    done = meshwright("train", *SMALL, "--data", str(text), "--layout", layout, "--out", "away", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "away/offload").iterdir()) == [], "the files are scratch"
    program = rank_program(load_model("llama-tiny"), parse_layout(layout), Workload(32, 4), Place())
    rank = json.loads((tmp_path / "away/report.json").read_text())["ranks"][0]
    assert rank["away_bytes"] == away_bytes(program, parse_layout(layout))["file"]


@pytest.mark.parity
def test_a_run_that_offloads_all_is_the_same(tmp_path: Path, text: Path) -> None:
    common = ("--data", str(text), "--seq", "32", "--global-batch", "4", "--steps", "3", "--save-every", "2")
    layout = "dp2:zero3 mb1 bf16"
    for name, given in (("plain", (layout,)), ("away", (f"{layout} offload:all@file", "--offload-dir", "drive"))):
        done = meshwright("train", "--layout", *given, "--out", name, *common, directory=tmp_path)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "away/metrics.jsonl") == losses(tmp_path / "plain/metrics.jsonl")
    assert list((tmp_path / "drive").iterdir()) == [], "the files are scratch"
    table = meshwright("compare", "away", "--cluster", "local", "--json", directory=tmp_path)
    assert table.returncode == 0, table.stderr
    counted = {row["figure"]: row for row in json.loads(table.stdout) if row["unit"] == "B"}
    assert counted["file, largest rank"]["measured"] > 0
    assert all(row["error"] == 0 for row in counted.values())


def test_bad_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "broken.yaml").write_text("model: llama-tiny\nlayout: [dp2\nsteps: 3\n")
    (tmp_path / "typo.yaml").write_text("model: llama-tiny\nlayuot: dp2\n")
    (tmp_path / "type.yaml").write_text("model: llama-tiny\nsteps: many\n")

    def says(*arguments: str) -> str:
        return refusal(monkeypatch, capsys, "train", *arguments)

    assert "empty.txt" in says("--data", "empty.txt")
    assert "tokens" in says("--data", "short.txt")
    assert "broken.yaml, line" in says("broken.yaml")
    assert "typo.yaml, line 2" in (line := says("typo.yaml"))
    assert "layout" in line
    assert "type.yaml, line 2" in (line := says("type.yaml"))
    assert "many" in line


def test_a_launched_rank_that_refuses_is_one_line_too(tmp_path: Path) -> None:
    """The corpus is read by the ranks; what is wrong with it reaches the person as if there were only one process."""
    (tmp_path / "short.txt").write_text("too short")
    done = meshwright("train", *SMALL, "--data", "short.txt", "--layout", "dp2 mb2 fp32", directory=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr
