"""State that waits outside the accelerator until it is needed: in the host's memory, or in files.

A `Record` is a flat tensor that is kept there. It is read into a tensor on the device and written back by threads, so that the rank
computes meanwhile: the optimizer reads the state of the next bucket while it steps one and the one before is written
(`DataParallel.states`), and a unit's parameters are read while the units before it compute (`parallel/units.py`).

The state travels to the optimizer, and not the gradients to an optimizer on the host (Ren et al. 2021, ZeRO-Offload, arXiv
2101.06840, section 3). That moves 24 bytes a parameter instead of 6 to 8, half of them in each direction. But the arithmetic stays on
the device, so a run with offload equals one without to the bit, the ranks of a node do not share its cores for it, and files are
served alike: Rajbhandari et al. 2021, ZeRO-Infinity, arXiv 2104.07857, section 5, stream it so from NVMe.

On a CPU the mechanism is the same, with host tensors in place of the device's. With CUDA the host's tensors are pinned, each thread
copies on a stream of its own, after an event on the stream that made or last read the tensor, and is done when the copy is. That path
has never been run: no machine with a GPU was at hand.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from meshwright.parallel.mesh import Mesh
from meshwright.schedule.buckets import AHEAD, IN_TURN
from meshwright.spec.errors import UserError
from meshwright.spec.layout import OffloadTo

THREADS = 2
"""One reads ahead while the other writes behind."""


class Offload:
    """What one rank keeps away, and the threads that move it."""

    def __init__(self, to: OffloadTo, device: torch.device, rank: int, directory: Path | None = None):
        """`directory`: of the files; None: that of temporary files. Raises UserError when it cannot be written."""
        self.to, self.device, self.rank = to, device, rank
        self.records: list[Record] = []
        self.moved: Counter[str] = Counter()
        """Bytes "read" to the device and "written" back, since the start."""
        self.on_cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="offload")
        self._lane = _Lane()
        self._in_turn: list[Tensor] = []
        self._ahead: list[Tensor] = []
        self.working_bytes = 0
        """Of the buffers on the device through which what is away passes."""
        self._directory = _made(directory) if to == "file" else None
        self._descriptors: list[int] = []
        self.close = weakref.finalize(self, _close, self._pool, self._descriptors)
        """Ends the threads and lets go of the files."""

    @property
    def kept_bytes(self) -> int:
        return sum(record.nbytes for record in self.records)

    def record(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Record:
        """A new one, of zeros."""
        if self._directory is None:
            made: Record = HostRecord(self, torch.zeros(shape, dtype=dtype, pin_memory=self.on_cuda))
        else:
            path = self._directory / f"meshwright-{os.getpid()}-rank-{self.rank:05d}-{name}.bin"
            descriptor = _allocated(path, torch.Size(shape).numel() * dtype.itemsize)
            self._descriptors.append(descriptor)
            kept = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
            path.unlink()  # open files live on without a name, and are gone however the run ends
            made = FileRecord(self, kept, descriptor)
        self.records.append(made)
        return made

    def in_turn(self, nbytes: int) -> list[Tensor]:
        """The buffers, of `nbytes` each, through which the optimizer's state passes: the same ones at every call."""
        if not self._in_turn:
            self._in_turn = self._slabs(IN_TURN, nbytes)
        return self._in_turn

    def open_ahead(self, nbytes: int) -> None:
        """Make the buffers into which the parameters of units are read, `nbytes` for one unit."""
        if not self._ahead:
            self._ahead = self._slabs(AHEAD, nbytes)

    def take_ahead(self) -> Tensor:
        """One of these buffers; `give_ahead` it back."""
        return self._ahead.pop()

    def give_ahead(self, slab: Tensor) -> None:
        self._ahead.append(slab)

    def _slabs(self, count: int, nbytes: int) -> list[Tensor]:
        self.working_bytes += count * nbytes
        return [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(count)]

    def submit(self, record: Record, tensor: Tensor, *, write: bool) -> Future[None]:
        """Move between `record` and `tensor`, which must be left alone until the result is there."""
        self.moved["written" if write else "read"] += record.nbytes
        move = record.take if write else record.give
        if not self.on_cuda:
            return self._pool.submit(move, tensor)
        ready = torch.cuda.Event()
        ready.record()
        return self._pool.submit(self._on_lane, move, tensor, ready)

    def staging(self, tensor: Tensor) -> Tensor:
        """Host memory for as much as `tensor`, this thread's own: `tensor` itself on a CPU, else pinned."""
        if not self.on_cuda:
            return tensor
        if self._lane.staging is None or self._lane.staging.nbytes < tensor.nbytes:
            self._lane.staging = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._lane.staging[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _on_lane(self, move: Callable[[Tensor], None], tensor: Tensor, ready: torch.cuda.Event) -> None:
        with torch.cuda.device(self.device):
            if self._lane.stream is None:
                self._lane.stream = torch.cuda.Stream()
            with torch.cuda.stream(self._lane.stream):
                self._lane.stream.wait_event(ready)
                move(tensor)
                self._lane.stream.synchronize()


class _Lane(threading.local):
    """What a thread has to itself, with CUDA."""

    stream: torch.cuda.Stream | None = None
    staging: Tensor | None = None


class Record:
    """A tensor kept away. `kept` is where it rests: for use before the first step and in checkpoints, while nothing moves."""

    def __init__(self, offload: Offload, kept: Tensor):
        self.offload, self.kept = offload, kept

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes

    def read(self, out: Tensor) -> Future[None]:
        """Start to copy it to `out`, on the device."""
        return self.offload.submit(self, out, write=False)

    def write(self, value: Tensor) -> Future[None]:
        """Start to replace it by `value`, on the device."""
        return self.offload.submit(self, value, write=True)

    def give(self, out: Tensor) -> None:
        raise NotImplementedError

    def take(self, value: Tensor) -> None:
        raise NotImplementedError


class HostRecord(Record):
    def give(self, out: Tensor) -> None:
        out.copy_(self.kept, non_blocking=True)

    def take(self, value: Tensor) -> None:
        self.kept.copy_(value, non_blocking=True)


class FileRecord(Record):
    """Read and written by system calls, through the system's page cache; what rests is the file mapped into memory, whose pages the
    system drops when it likes."""

    def __init__(self, offload: Offload, kept: Tensor, descriptor: int):
        super().__init__(offload, kept)
        self.descriptor = descriptor

    def give(self, out: Tensor) -> None:
        staging = self.offload.staging(out)
        into, done = _bytes(staging), 0
        while done < len(into):
            got = os.preadv(self.descriptor, [into[done:]], done)
            if got == 0:
                raise OSError(f"an offload file ends after {done} of {len(into)} bytes: was it changed during the run?")
            done += got
        if staging is not out:
            out.copy_(staging, non_blocking=True)

    def take(self, value: Tensor) -> None:
        staging = self.offload.staging(value)
        if staging is not value:
            staging.copy_(value, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        data, done = _bytes(staging), 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], done)


def make_offload(mesh: Mesh, directory: Path | None) -> Offload | None:
    """As the layout says; None where it keeps everything on the device."""
    layout = mesh.layout
    return None if layout.offload == "none" else Offload(layout.offload_to, mesh.device, mesh.rank, directory)


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor on the host."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def _made(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.gettempdir())
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"offload directory {directory}: {error.strerror}; try another with --offload-dir") from None
    return directory


def _allocated(path: Path, nbytes: int) -> int:
    """A file of `nbytes` zeros, whose space is taken now: running out of it in the middle of a run would lose the run."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
            path.unlink()
        raise UserError(
            f"offload needs {nbytes:,} bytes in {path}: {error.strerror}; try another directory with --offload-dir"
        ) from None
    return descriptor


def _close(pool: ThreadPoolExecutor, descriptors: list[int]) -> None:
    pool.shutdown()
    for descriptor in descriptors:
        os.close(descriptor)
