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

# What `torch.cuda.get_device_name` says (every part, in any case) -> catalogue name; the first match counts.
# One device of an MI250X is half of the catalogue's card, so it is not here.
_ACCELERATORS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gb300",), "gb300"),
    (("gb200",), "gb200"),
    (("gh200", "480gb"), "gh200-96"),  # named for its 480 GB of host memory; the part with 144 GB is another
    (("b300",), "b300-sxm"),
    (("b200",), "b200-sxm"),
    (("h200", "nvl"), "h200-nvl"),
    (("h200",), "h200-sxm"),
    (("h800", "pcie"), ""),  # not in the catalogue
    (("h800",), "h800-sxm"),
    (("h100", "nvl"), "h100-nvl"),
    (("h100", "pcie"), "h100-pcie"),
    (("h100",), "h100-sxm"),
    (("h20",), "h20"),
    (("a100", "sxm", "80gb"), "a100-sxm-80"),
    (("a100", "sxm", "40gb"), "a100-sxm-40"),
    (("a100", "pci", "80gb"), "a100-pcie-80"),
    (("a100", "pci", "40gb"), "a100-pcie-40"),
    (("v100-sxm2-32gb",), "v100-sxm2-32"),
    (("l40s",), "l40s"),
    (("rtx 4090",), "rtx-4090"),
    (("mi300x",), "mi300x"),
    (("mi325x",), "mi325x"),
    (("mi350x",), "mi350x"),
    (("mi355x",), "mi355x"),
)


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


def catalogue_name(device_name: str) -> str | None:
    """The catalogue's name of the accelerator that the driver calls `device_name`; None when it has none."""
    lower = device_name.lower()
    return next((name for parts, name in _ACCELERATORS if all(part in lower for part in parts)), None) or None


def load_share() -> float:
    """Share of all cores that other processes take now, 0 to 1. Watches for half a second."""
    return float(psutil.cpu_percent(interval=0.5)) / 100


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
