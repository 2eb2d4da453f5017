"""The words of a pipeline schedule: for each stage, an ordered list of actions.

`cost/timeline.py` prices these lists, `parallel/pipeline.py` runs them, the report draws them.
Communication actions that follow one another form one batch: they are posted together, so that two neighbours
that send to each other at once do not wait for ever (NCCL matches sends and receives in posting order).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"
    SEND_FORWARD = "sF"
    """Send the output activation to the next stage."""
    RECV_FORWARD = "rF"
    """Receive the input activation from the previous stage."""
    SEND_BACKWARD = "sB"
    """Send the input's gradient to the previous stage."""
    RECV_BACKWARD = "rB"
    """Receive the output's gradient from the next stage."""

    @property
    def is_compute(self) -> bool:
        return self is Kind.FORWARD or self is Kind.BACKWARD

    @property
    def is_send(self) -> bool:
        return self in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)

    @property
    def step(self) -> int:
        """Which neighbour the communication is with: +1 the next stage, -1 the previous one."""
        return {Kind.SEND_FORWARD: 1, Kind.RECV_BACKWARD: 1, Kind.RECV_FORWARD: -1, Kind.SEND_BACKWARD: -1}[self]

    @property
    def match(self) -> Kind:
        """The action of the other side that completes this communication."""
        return {
            Kind.SEND_FORWARD: Kind.RECV_FORWARD,
            Kind.RECV_FORWARD: Kind.SEND_FORWARD,
            Kind.SEND_BACKWARD: Kind.RECV_BACKWARD,
            Kind.RECV_BACKWARD: Kind.SEND_BACKWARD,
        }[self]


@dataclass(frozen=True, slots=True)
class Action:
    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Schedule:
    """`actions[stage]` is what that stage does, in order."""

    name: str
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.actions)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches whose activations the stage holds at once."""
        held = most = 0
        for action in self.actions[stage]:
            held += (action.kind is Kind.FORWARD) - (action.kind is Kind.BACKWARD)
            most = max(most, held)
        return most
