"""Counts what a rank sends: the measured side of the cost model's list of collectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock


@dataclass(frozen=True, order=True)
class Entry:
    """One kind of communication: `op` among `group_size` ranks of `axis`."""

    axis: str
    op: str
    group_size: int


@dataclass
class Ledger:
    """Calls and bytes by kind. Bytes: the buffer of an all-reduce, the gathered array of an all-gather, the whole input of
    a reduce-scatter, the message of a send. The two passes of a pair count at the same time."""

    count: Counter[Entry] = field(default_factory=Counter)
    bytes: Counter[Entry] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def record(self, entry: Entry, nbytes: int) -> None:
        with self._lock:
            self.count[entry] += 1
            self.bytes[entry] += nbytes

    def clear(self) -> None:
        self.count.clear()
        self.bytes.clear()

    def rows(self) -> list[tuple[Entry, int, int]]:
        """(kind, calls, bytes), sorted."""
        return [(entry, self.count[entry], self.bytes[entry]) for entry in sorted(self.count)]
