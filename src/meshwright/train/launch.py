"""Start the ranks: under an outer torchrun or Slurm join it, otherwise start local processes with torchrun's own API."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshwright.spec.errors import UserError


class RankFailed(RuntimeError):
    """A rank failed; the message names the first one and its error. `details` is that rank's traceback, if it left one."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def launch(entry: Callable[..., None], world: int, *args: Any) -> None:
    """Run `entry(*args)` on `world` ranks, each with its default process group set up.

    Raises UserError if the outer launcher started another number of ranks, or if a rank raised UserError; RankFailed, with
    the first cause, when a rank fails otherwise (the others are stopped).
    """
    outer = outer_launcher(os.environ)
    if outer is not None:
        if int(outer["WORLD_SIZE"]) != world:
            raise UserError(f"the layout needs {world} ranks, but the launcher started {outer['WORLD_SIZE']}")
        os.environ.update(outer)
        _run_rank(entry, args)
    elif world == 1:
        set_threads(1)
        entry(*args)
    else:
        _launch_locally(entry, world, args)


def outer_launcher(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables that torch.distributed reads, from torchrun's own or Slurm's; None when neither started this process."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in environment}
    if int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return None
    address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise UserError("started by Slurm without MASTER_ADDR: export MASTER_ADDR=<first node> before srun")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000)),
    }


def local_ranks(environment: Mapping[str, str], world: int) -> int:
    """Ranks that run on this machine: what the outer launcher says, or all `world` of them."""
    outer = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE")
    return int(outer) if outer_launcher(environment) is not None and outer else world


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether this process, not a child of it, is rank 0 of the run or started it."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def leave_outer_launcher() -> None:
    """End a rank of an outer launcher without taking the interpreter down, as children of multiprocessing end.

    A worker thread of gloo that lets go of its last tensor while Python finalizes is unwound inside C++, which aborts: a run that
    has finished would be reported as failed (pytorch #179291). Does nothing in a process that no launcher started.
    """
    if outer_launcher(os.environ) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank_device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def set_threads(local_ranks: int) -> None:
    """Share the cores out: ranks that each start a thread a core slow one another down."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))


def _launch_locally(entry: Callable[..., None], world: int, args: tuple[Any, ...]) -> None:
    for noisy in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what they report reaches the caller as RankFailed
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "meshwright.train.loop"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id="meshwright",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.2,
    )
    with tempfile.TemporaryDirectory() as obituaries:
        try:
            elastic_launch(config, _run_recorded)(entry, args, obituaries)
        except ChildFailedError as error:
            raise _first_cause(error, Path(obituaries), world) from None


def _run_rank(entry: Callable[..., None], args: tuple[Any, ...]) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = rank_device()
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    entry(*args)
    dist.destroy_process_group()


def _run_recorded(entry: Callable[..., None], args: tuple[Any, ...], obituaries: str) -> None:
    """Run a rank; if it fails, leave a note of when and why. The agent keeps one failure only, not always the first."""
    try:
        _run_rank(entry, args)
    except BaseException as error:
        user = isinstance(error, UserError)
        message = str(error) if user else f"{type(error).__name__}: {error}"
        note = {"time": time.time(), "user": user, "message": message, "traceback": traceback.format_exc()}
        (Path(obituaries) / os.environ["RANK"]).write_text(json.dumps(note))
        sys.exit(1)  # without the traceback that every rank would print


_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)
"""What gloo and NCCL say on ranks whose partner has gone: an effect, never the first cause."""


def _first_cause(error: ChildFailedError, obituaries: Path, world: int) -> Exception:
    """The failure that the others follow from: the earliest that is no lost partner, or else the agent's own (a signal)."""
    notes = [(int(path.name), json.loads(path.read_text())) for path in obituaries.iterdir()]
    causes = [(rank, note) for rank, note in notes if not any(lost in note["message"] for lost in _LOST_PEER)]
    if causes:
        rank, note = min(causes, key=lambda item: item[1]["time"])
        if note["user"]:
            return UserError(note["message"])
        return RankFailed(f"rank {rank} of {world} failed first: {note['message']}", note["traceback"])
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return RankFailed(f"rank {rank} of {world} was killed by signal {-failure.exitcode} (out of memory?)")
    return RankFailed(f"rank {rank} of {world} lost a partner that died without a word (killed, or out of memory?)")
