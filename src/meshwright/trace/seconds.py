"""Seconds of what a dry run has seen, as the cost model prices it. Without torch.

Products, attention and collectives have their own prices. Elementwise work is not in a trace: an action's comes from the program of the
estimate, all at its end, and so does what it waits for the host that starts its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Attention, Collective, Elementwise, Gemm, Op
from meshwright.cost.program import Program
from meshwright.cost.result import Estimate
from meshwright.schedule.actions import Action, Kind
from meshwright.spec.cluster import Cluster
from meshwright.spec.grid import Grid, group_members
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload
from meshwright.trace.result import Attended, Event, Product, Received, Sent, StageTrace, Trace


class Prices:
    """Of one layout's events on `cluster`. Raises UserError where `estimate` does."""

    def __init__(self, trace: Trace, model: Model, cluster: Cluster):
        self.trace, self.model, self.cluster = trace, model, cluster
        self.layout: Layout = trace.layout
        workload: Workload = trace.workload
        self._estimator = Estimator(model, cluster, workload)
        self._estimator.check(self.layout)
        self._kernels = self._estimator.kernels(self.layout, shared=False)
        self._collectives: dict[tuple[str, str, int, int], float] = {}

    @property
    def hides(self) -> bool:
        """Whether communication can run beside computation."""
        return self._estimator.times.hides

    @property
    def overhead_bytes(self) -> int:
        """What the accelerator's software takes for itself."""
        return int(self._estimator.overhead)

    @property
    def memory_bytes(self) -> int:
        """Of an accelerator."""
        return int(self.cluster.accelerator.memory_bytes)

    def head_room(self, stage: StageTrace) -> int:
        """Bytes left of the accelerator's memory at the stage's peak; below zero where it does not fit."""
        return self.memory_bytes - self.overhead_bytes - stage.peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "cluster": self.cluster.name,
            "memory_bytes": self.memory_bytes,
            "overhead_bytes": self.overhead_bytes,
            "head_room_bytes": {str(stage.stage): self.head_room(stage) for stage in self.trace.stages},
        }

    @cached_property
    def estimate(self) -> Estimate:
        """Of the whole layout, for comparison and for stages that were not traced."""
        return self._estimator.estimate(self.layout)

    @cached_property
    def send(self) -> float:
        """From a stage to the next."""
        return self._estimator.send_seconds(self.layout)

    def of(self, event: Event, rank: int) -> float:
        """Of an event that `rank` saw; a receive is priced where it is sent."""
        if isinstance(event, Product):
            return self._kernels.gemm(Gemm(event.path, event.groups * event.m, event.n, event.k, event.groups))
        if isinstance(event, Attended):
            return self._attention(event)
        if isinstance(event, Sent | Received):
            return self._collective(event, rank)
        return 0.0

    def rest(self, stage: StageTrace, action: Action) -> tuple[float, float]:
        """Of an action: its elementwise work, and what it waits for the host."""
        if action.kind is Kind.BACKWARD_WEIGHT:
            return 0.0, 0.0
        program, forward = self._programs[stage.stage], action.kind is Kind.FORWARD
        elementwise = self._kernels.elementwise(program.casts) if program.casts.bytes else 0.0
        waits = 0.0
        for piece, repeat in program.chunks[action.chunk]:
            ops = piece.forward if forward else piece.backward
            elementwise += repeat * sum(self._kernels.elementwise(op) for op in _elementwise(ops))
            waits += repeat * self._estimator.pieces.host_waits(piece, self.layout)[0 if forward else 1]
        return elementwise, waits

    def update(self, stage: StageTrace) -> float:
        """Of the optimizer's elementwise work."""
        return self._kernels.elementwise(self._programs[stage.stage].optimizer)

    @cached_property
    def _programs(self) -> list[Program]:
        return self._estimator.programs(self.layout)

    def _attention(self, event: Attended) -> float:
        """As the kernel of a whole causal square of so many keys, in proportion to the FLOPs."""
        window = self._window(event.path) if event.mask == "given" else None
        sizes = event.batch, event.heads, event.keys, event.head_dim, event.value_dim, window, event.backward
        square = Attention(event.path, *sizes)
        is_square = event.mask == "given"  # causal, with a window or sinks
        return self._kernels.attention(square) * (event.queries / event.keys if is_square else event.flops / square.flops)

    def _window(self, path: str) -> int | None:
        words = path.split(".")
        return self.model.window(int(words[1])) if words[0] == "layers" else None

    def _collective(self, event: Sent | Received, rank: int) -> float:
        key = event.group, event.op if isinstance(event, Sent) else "send", event.nbytes, rank
        if key not in self._collectives:
            members = group_members(Grid(self.layout), self.model, event.group)(rank)
            call = Collective(event.axis, key[1], len(members), members[1] - members[0], event.nbytes)  # type: ignore[arg-type]
            self._collectives[key] = self._estimator.times.seconds(call)
        return self._collectives[key]


def _elementwise(ops: tuple[Op, ...]) -> Iterator[Elementwise]:
    return (op for op in ops if isinstance(op, Elementwise))
