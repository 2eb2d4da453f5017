"""A stage's computations, written down phase by phase."""

from __future__ import annotations

from collections import Counter, deque

from meshwright.schedule.actions import Action, Kind, act


class Turns:
    """Each call takes the next micro-batch of its chunk; past the last one it does nothing."""

    def __init__(self, micro_batches: int):
        self.micro_batches = micro_batches
        self.actions: list[Action] = []
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self._deferred: deque[Action] = deque()

    @property
    def forwards_left(self) -> bool:
        """Whether a chunk that has begun, or the first, has forwards left."""
        return any(self._forwards[chunk] < self.micro_batches for chunk in {0, *self._forwards})

    def forward(self, chunk: int) -> None:
        self._next(self._forwards, Kind.FORWARD, chunk)

    def backward(self, chunk: int) -> None:
        self._next(self._backwards, Kind.BACKWARD, chunk)

    def backward_input(self, chunk: int) -> None:
        if self._next(self._backwards, Kind.BACKWARD_INPUT, chunk):
            self._deferred.append(self.actions[-1].of(Kind.BACKWARD_WEIGHT))

    def backward_weight(self) -> None:
        """The weight gradients that have waited longest."""
        if self._deferred:
            self.actions.append(self._deferred.popleft())

    def finish(self) -> list[Action]:
        """All that was written down, and the weight gradients that still wait."""
        return self.actions + list(self._deferred)

    def _next(self, count: Counter[int], kind: Kind, chunk: int) -> bool:
        if count[chunk] == self.micro_batches:
            return False
        self.actions.append(act(kind, count[chunk], chunk))
        count[chunk] += 1
        return True
