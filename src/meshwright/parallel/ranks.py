"""Processes that stay alive between calls, each call with process groups of its own: ranks of this machine on demand."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "torch.distributed.device_mesh", "meshwright.parallel.apply"]


class RankError(RuntimeError):
    """A rank raised; carries the first rank's number and traceback."""


class RankPool:
    """Processes that wait for work; more are started when a call asks for more. `backend`: gloo or nccl."""

    def __init__(self, backend: str = "gloo") -> None:
        self.backend = backend
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(*args)` on ranks 0..world-1 with the default process group set up. Returns each rank's result.

        Raises RankError when a rank raises or dies (the first one), or when `timeout` seconds pass.
        """
        while len(self._ranks) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, list(sys.path)), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        with tempfile.TemporaryDirectory() as directory:
            for rank in range(world):
                self._ranks[rank][1].send(
                    (function, args, rank, world, os.path.join(directory, "store"), timeout, self.backend)
                )
            try:
                return self._collect(world, time.monotonic() + timeout)
            except RankError:
                self.close()  # the other ranks may wait for the failed one for ever
                raise

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks.clear()

    def _collect(self, world: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {self._ranks[rank][1]: rank for rank in range(world)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} of {world} did not finish in time")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    failed, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, value = True, "the process died"
                if failed:
                    raise RankError(f"rank {rank} of {world}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: looking through it again after every call would take longer than most calls
    while True:
        try:
            function, args, rank, world, store, timeout, backend = connection.recv()
        except EOFError:
            return
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                backend, store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
            )
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        if dist.is_initialized() and not answer[0]:
            dist.destroy_process_group()
        # An engine is full of cycles, and so are the groups that it holds, each with threads and sockets: left to their own time, a
        # hundred calls pile up hundreds of both. It must be before the answer: after it the store's directory goes, and a store
        # that ends while its file disappears looks for the file until it runs into its timeout.
        del function, args
        gc.collect()
        connection.send(answer)
