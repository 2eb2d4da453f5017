"""What this machine is, before anything is measured: processor, memory, and the accelerator's name in the catalogue."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from meshwright.spec.errors import UserError


@dataclass(frozen=True)
class Machine:
    """`devices` is the number of GPUs; 0: ranks compute on the CPU. `memory_bytes` is that of one GPU, or of the host."""

    processor: str
    vendor: str
    cores: int
    devices: int
    memory_bytes: int

    @property
    def backend(self) -> str:
        return "nccl" if self.devices else "gloo"

    @property
    def slug(self) -> str:
        """The processor as a name in a cluster file."""
        return re.sub(r"[^a-z0-9]+", "-", self.processor.lower()).strip("-")

    def check_ranks(self, ranks: int) -> None:
        """Raises UserError when so many ranks cannot measure at once."""
        if ranks < 1:
            raise UserError(f"ranks {ranks}: measure with 1 or more")
        if self.devices and ranks > self.devices:
            raise UserError(f"ranks {ranks} on {self.devices} GPUs: NCCL wants a GPU for each, so at most {self.devices}")


def this_machine() -> Machine:
    """The GPUs if torch sees any, else the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        vendor = "AMD" if torch.version.hip else "NVIDIA"
        return Machine(torch.cuda.get_device_name(0), vendor, cores, torch.cuda.device_count(), properties.total_memory)
    return Machine(_cpu_name(), "any", cores, 0, psutil.virtual_memory().total)


def foreign_seconds() -> float:
    """Core seconds that other processes than this one and its descendants have used; differences of it mean something."""
    everything = psutil.cpu_times()
    me = psutil.Process()
    own = sum(
        times.user + times.system for times in (process.cpu_times() for process in (me, *me.children(recursive=True)))
    )
    return float(everything.user + getattr(everything, "nice", 0.0) + everything.system - own)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
