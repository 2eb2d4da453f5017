"""Start the ranks: under an outer torchrun or Slurm join it, otherwise start local processes with torchrun's own API."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshwright.spec.errors import UserError


class RankFailed(RuntimeError):
    """A rank failed; the message names the first one and its error."""


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


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether this process, not a child of it, is rank 0 of the run or started it."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


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
    try:
        elastic_launch(config, _run_rank)(entry, args)
    except ChildFailedError as error:
        rank, exit_code, message = _first_cause(error)
        if message.startswith("UserError: "):
            raise UserError(message.removeprefix("UserError: ")) from None
        raise RankFailed(f"rank {rank} of {world} failed first (exit code {exit_code}): {message}") from None


@record
def _run_rank(entry: Callable[..., None], args: tuple[Any, ...]) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = rank_device()
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        entry(*args)
    except Exception:
        raise
    except BaseException as error:  # Distributed Checkpoint's is one, which the agent would not record
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    dist.destroy_process_group()


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Socket closed")
"""What gloo and NCCL say on ranks whose partner has gone: an effect, never the first cause."""


def _first_cause(error: ChildFailedError) -> tuple[int, int, str]:
    """(rank, exit code, message) of the failure that the others follow from; the agent's clock has whole seconds only."""
    failures = [(rank, failure, _failure_message(failure.message)) for rank, failure in error.failures.items()]
    rank, failure, message = min(failures, key=lambda f: (any(lost in f[2] for lost in _LOST_PEER), f[1].timestamp))
    return rank, failure.exitcode, message


def _failure_message(raw: Any) -> str:
    """The exception's own line out of what the elastic agent recorded (JSON, or text when the rank was killed)."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError:
            return raw
    while isinstance(raw, dict) and "message" in raw:
        raw = raw["message"]
    return str(raw)
