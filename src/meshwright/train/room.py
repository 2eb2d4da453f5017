"""Whether this machine can hold what a layout keeps on its ranks: asked before they start, because a machine that runs out of
memory kills them without a word."""

from __future__ import annotations

import psutil
import torch

from meshwright.cost.memory import state_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.schedule.stages import alike_stages
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


def check_machine_room(model: Model, layout: Layout, workload: Workload, local_ranks: int) -> None:
    """Raise UserError when parameters, gradients and optimizer state alone are more than the memory there is.

    `local_ranks`: ranks of the layout that run on this machine. Each has a GPU, or all share the host's memory.
    """
    on_gpu = torch.cuda.is_available()
    here = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    rank = largest_state_bytes(model, layout, workload)
    held = rank if on_gpu else rank * local_ranks
    if held > here:
        where = "the GPU" if on_gpu else f"this machine, for its {local_ranks} rank{'s' if local_ranks > 1 else ''},"
        raise UserError(
            f"{model.name} under {layout} keeps up to {_gib(rank)} of parameters, gradients and optimizer state on a rank, but "
            f"{where} has {_gib(here)}: take more ranks with zero3, tp or pp, or a smaller model; `meshwright plan` finds what fits"
        )


def largest_state_bytes(model: Model, layout: Layout, workload: Workload) -> int:
    """Parameters, gradients and optimizer state of the stage that keeps most."""
    firsts = [members[0] for members in alike_stages(model, layout)]
    programs = (rank_program(model, layout, workload, Place(stage)) for stage in firsts)
    return max(sum(state_bytes(program, layout).values()) for program in programs)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
