"""Run a function on several ranks of one machine, fast enough for unit tests.

    results = run_distributed(check_gradients, 4, layout)     # one result a rank

Starting Python with torch costs seconds, so the ranks are processes that stay alive between calls. The function must be
importable by its module's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshwright.parallel.ranks import RankError, RankPool

__all__ = ["RankError", "pool", "run_distributed"]

_POOL = RankPool()


def pool() -> RankPool:
    """The processes that `run_distributed` runs on."""
    return _POOL


def run_distributed(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` on ranks 0..world-1 with gloo. Returns each rank's result.

    Raises RankError with the first failing rank's traceback, or when `timeout` seconds pass.
    """
    return _POOL.run(function, world, *args, timeout=timeout)
