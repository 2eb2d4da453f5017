"""Ranks that stay alive between calls end what a call began."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_workers import threads_beside_a_group_in_a_cycle

from meshwright.testing import run_distributed


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_groups_do_not_outlive_their_call() -> None:
    """Each has threads and sockets: a machine has a limited number of both."""
    threads = [run_distributed(threads_beside_a_group_in_a_cycle, 2, [0, 1]) for _ in range(6)]
    assert all(last <= first for first, last in zip(threads[0], threads[-1], strict=True)), threads
