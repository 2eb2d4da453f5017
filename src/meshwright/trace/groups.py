"""Groups that tell the recorder what the engine's ledger does not ask: which group it is, to and from whom, and when what was posted is
waited for. With that, a trace knows what may run beside what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Entry, Ledger
from meshwright.parallel.mesh import Mesh
from meshwright.trace.recorder import Recorder
from meshwright.trace.result import Received, Sent, Waited


def followed(mesh: Mesh, recorder: Recorder) -> Mesh:
    """`mesh` with groups that book every call in `recorder`."""
    groups = {
        name: TracedGroup(each.axis, each.ranks, each.index, each.handle, TracedLedger(recorder, name))
        for name, each in mesh.groups.items()
    }
    return replace(mesh, groups=MappingProxyType(groups))  # type: ignore[arg-type]


class TracedLedger(Ledger):
    """Of one group: books each call in the recorder, one by one."""

    def __init__(self, recorder: Recorder, group: str) -> None:
        super().__init__()
        self.recorder, self.group = recorder, group
        self.peers: list[int] = []
        """Of the sends that are being posted."""
        self.posts = False
        """Whether what is booked now is waited for later."""
        self.posted: list[int] = []
        """Numbers of what was booked so."""

    def record(self, entry: Entry, nbytes: int) -> None:
        super().record(entry, nbytes)
        peer = self.peers.pop(0) if entry.op == "send" else -1
        number = self.number() if self.posts else 0
        path = self.recorder.paths.here
        self.recorder.add(Sent(entry.axis, entry.op, entry.group_size, nbytes, path, self.group, peer, number))

    def number(self) -> int:
        self.recorder.posted += 1
        self.posted.append(self.recorder.posted)
        return self.recorder.posted


class TracedGroup(Group):
    """A group whose ledger is a `TracedLedger`, and whose handles say when they are waited for."""

    ledger: TracedLedger

    def all_reduce(self, tensor: Tensor, *, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> Any:
        self.ledger.posts = not wait
        return self._handle(super().all_reduce(tensor, op=op, wait=wait))

    def all_gather(self, out: Tensor, tensor: Tensor, *, wait: bool = True) -> Any:
        self.ledger.posts = not wait
        return self._handle(super().all_gather(out, tensor, wait=wait))

    def reduce_scatter(self, out: Tensor, tensor: Tensor, *, wait: bool = True) -> Any:
        self.ledger.posts = not wait
        return self._handle(super().reduce_scatter(out, tensor, wait=wait))

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[Any]:
        ledger, recorder = self.ledger, self.ledger.recorder
        ledger.posts, ledger.peers = True, [peer for _, peer in sends]
        works = super().exchange(sends, receives)
        for tensor, peer in receives:
            recorder.add(Received(self.axis, tensor.nbytes, recorder.paths.here, ledger.group, peer, ledger.number()))
        ledger.posts, numbers, ledger.posted = False, tuple(ledger.posted), []
        if len(works) == len(numbers):
            return [Handle(work, recorder, (number,)) for work, number in zip(works, numbers, strict=True)]
        return [Handle(work, recorder, numbers) for work in works]  # one for the whole batch

    def _handle(self, work: Any) -> Any:
        """What the engine is given to wait on."""
        ledger = self.ledger
        ledger.posts, numbers, ledger.posted = False, tuple(ledger.posted), []
        return Handle(work, ledger.recorder, numbers) if numbers else work


@dataclass(frozen=True)
class Handle:
    """In place of a `dist.Work`."""

    work: Any
    recorder: Recorder
    numbers: tuple[int, ...]

    def wait(self) -> None:
        for number in self.numbers:
            self.recorder.add(Waited(number))
        self.work.wait()

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())
