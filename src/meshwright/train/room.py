"""Whether this machine can hold what a layout keeps on its ranks: asked before they start, because a machine that runs out of
memory kills them without a word."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from meshwright.cost.memory import away_bytes, state_bytes
from meshwright.cost.program import Place, Program, rank_program
from meshwright.schedule.stages import alike_stages
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


def check_machine_room(model: Model, layout: Layout, workload: Workload, local_ranks: int) -> None:
    """Raise UserError when parameters, gradients and optimizer state alone are more than the memory there is.

    `local_ranks`: ranks of the layout that run on this machine. Each has a GPU, or all share the host's memory, which also takes what
    is offloaded to it.
    """
    on_gpu, memory = torch.cuda.is_available(), psutil.virtual_memory().total
    here = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory
    rank, host = largest_state_bytes(model, layout, workload), largest_away_bytes(model, layout, workload, "host")
    if not on_gpu:
        rank, host = rank + host, 0
    held = rank if on_gpu else rank * local_ranks
    if held > here:
        where = "the GPU" if on_gpu else f"this machine, for its {local_ranks} rank{'s' if local_ranks > 1 else ''},"
        raise UserError(
            f"{model.name} under {layout} keeps up to {_gib(rank)} of parameters, gradients and optimizer state on a rank, but "
            f"{where} has {_gib(here)}: take more ranks with zero3, tp or pp, or a smaller model; `meshwright plan` finds what fits"
        )
    if host * local_ranks > memory:
        raise UserError(
            f"{model.name} under {layout} offloads up to {_gib(host)} a rank to the host, {_gib(host * local_ranks)} in all, but it has "
            f"{_gib(memory)}: take more machines, or files: offload:{layout.offload}@file"
        )


def check_offload_room(model: Model, layout: Layout, workload: Workload, local_ranks: int, directory: Path) -> None:
    """Raise UserError when `directory` cannot be written, or its file system has no room for what the ranks on this machine offload to
    files."""
    needed = local_ranks * largest_away_bytes(model, layout, workload, "file")
    if not needed:
        return
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"offload to {directory}: {there} is not a directory that can be written; try another with --offload-dir"
        )
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"offload needs {needed:,} bytes in {directory} for {local_ranks} rank{'s' if local_ranks > 1 else ''}, but {free:,} are free: "
            f"try another directory with --offload-dir, or keep it in memory with offload:{layout.offload}@cpu"
        )


def largest_state_bytes(model: Model, layout: Layout, workload: Workload) -> int:
    """Parameters, gradients and optimizer state of the stage that keeps most."""
    return max(sum(state_bytes(program, layout).values()) for program in _programs(model, layout, workload))


def largest_away_bytes(model: Model, layout: Layout, workload: Workload, where: str) -> int:
    """What is offloaded to the "host" or to a "file" of the stage that offloads most."""
    if layout.offload == "none":
        return 0
    return max(away_bytes(program, layout).get(where, 0) for program in _programs(model, layout, workload))


def _programs(model: Model, layout: Layout, workload: Workload) -> list[Program]:
    """Of the stages that differ."""
    firsts = [members[0] for members in alike_stages(model, layout)]
    return [rank_program(model, layout, workload, Place(stage)) for stage in firsts]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
