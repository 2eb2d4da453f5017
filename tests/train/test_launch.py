"""Starting ranks, and what a person sees when that goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import train_workers

from meshwright.spec.errors import UserError
from meshwright.train.launch import RankFailed, launch, outer_launcher


def test_a_rank_that_fails_stops_the_others_and_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 3 failed first: OSError: the disk of rank 1 is on fire"):
        launch(train_workers.die_at_start, 3)
    assert time.monotonic() - began < 60


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by signal 9"):
        launch(train_workers.killed_at_start, 2)


def test_the_outer_launcher() -> None:
    assert outer_launcher({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "1"}
    assert outer_launcher(torchrun) == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
        "SLURM_JOB_ID": "77",
    }
    found = outer_launcher(slurm)
    assert found == {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20077"}
    with pytest.raises(UserError, match="MASTER_ADDR"):
        outer_launcher({"SLURM_PROCID": "5", "SLURM_NTASKS": "16"})


def test_a_launcher_with_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="needs 2 ranks, but the launcher started 4"):
        launch(train_workers.die_at_start, 2)


def test_a_rank_of_an_outer_launcher_leaves_without_finalizing() -> None:
    """What is printed is kept; what would run while the interpreter is taken down does not run."""
    program = (
        "import atexit; from meshwright.train.launch import leave_outer_launcher;"
        "atexit.register(print, 'finalized'); print('done'); leave_outer_launcher()"
    )
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for environment, printed in ((launched, "done\n"), ({}, "done\nfinalized\n")):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout) == (0, printed), done.stderr
