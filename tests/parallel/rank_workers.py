"""What ranks do in the tests of the pool itself."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def threads_beside_a_group_in_a_cycle(ranks: list[int]) -> int:
    """Threads of this process, where it has made a group that holds itself, as engines do."""
    cycle: list[Any] = [dist.new_group(ranks)]
    cycle.append(cycle)
    return len(os.listdir("/proc/self/task"))
