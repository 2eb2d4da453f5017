"""Runs the two passes of a pair (`schedule/pairs.py`) at the same time: the forward here, the backward in a thread of its own.

While one of them waits for its tokens to come from other ranks, or for the host to learn how many will, the other computes. A wait and
an operator both let go of Python's lock, so two threads are enough, and neither pass is cut up for it.

On a GPU a backward runs on the streams that its forward ran on. So each chunk has a stream of its own for both, and as a pair is of
two chunks, its passes are on two streams. All that is between actions is on the stream of the caller, which each action begins after
and ends before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Thread
from weakref import finalize

import torch
from torch import Tensor

Jobs = SimpleQueue[tuple[Future[None], Callable[[], None]] | None]


class Lanes:
    """Where chunks compute. `paired`: whether two of them ever do at the same time; if not, all is as without lanes."""

    def __init__(self, chunks: int, device: torch.device, paired: bool):
        self._beside = _Beside() if paired else None
        on_gpu = paired and device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(chunks)] if on_gpu else []

    @contextmanager
    def of(self, chunk: int) -> Iterator[None]:
        """Inside, operators are the chunk's; they come after what was before, and before what comes after."""
        if not self._streams:
            yield
            return
        caller, lane = torch.cuda.current_stream(), self._streams[chunk]
        lane.wait_stream(caller)
        with torch.cuda.stream(lane):
            yield
        caller.wait_stream(lane)

    def together(self, forward: Callable[[], None], backward: Callable[[], None], chunks: tuple[int, int]) -> None:
        """Both of a pair, `forward` on the first of `chunks` and `backward` on the second."""
        assert self._beside is not None, "pairs are run by lanes that were made for them"
        if not self._streams:
            beside = self._beside.submit(backward)
            forward()
            beside.result()
            return
        caller = torch.cuda.current_stream()
        lanes = [self._streams[chunk] for chunk in chunks]
        for lane in lanes:  # both before either runs, or one would begin after the other
            lane.wait_stream(caller)
        beside = self._beside.submit(partial(_on, lanes[1], backward))
        _on(lanes[0], forward)
        beside.result()
        for lane in lanes:
            caller.wait_stream(lane)


def used_here(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory is not given to others before the current stream is through with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
    return tensor


class _Beside:
    """One thread, which ends with this object. A process that fails does not wait for it, as it would for an executor's: what it does
    may wait for ranks that have failed too."""

    def __init__(self) -> None:
        self._jobs: Jobs = SimpleQueue()
        Thread(target=_serve, args=(self._jobs,), name="backward", daemon=True).start()
        finalize(self, self._jobs.put, None)

    def submit(self, run: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((future, run))
        return future


def _serve(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, run = job
        try:
            future.set_result(run())
        except BaseException as error:  # the caller's to raise
            future.set_exception(error)
        del job, future, run  # which hold on to the engine


def _on(stream: torch.cuda.Stream, run: Callable[[], None]) -> None:
    with torch.cuda.stream(stream):
        run()
