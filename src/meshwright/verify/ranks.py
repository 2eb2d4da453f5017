"""What a rank does in a verification: one step on a fixed batch, and what it computed, sent and passed on between operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.apply import apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
from meshwright.verify.feed import Feed, initial_weight, rank_batch
from meshwright.verify.watch import Record, watch

Sabotage = Callable[[], AbstractContextManager[Any]]
"""Breaks the engine for as long as it is entered, in every rank: for tests of the verification itself."""


@dataclass
class Report:
    """Of one rank. `sent`: (axis, operation, group size, calls, bytes). `record`: None unless it was asked for."""

    coordinates: dict[str, int]
    loss: float
    grad_norm: float
    gradients: list[tuple[Shard, Tensor]]
    sent: list[tuple[str, str, int, int, int]]
    record: Record | None

    # Between processes tensors go as arrays: PyTorch would open a file for each, and a machine allows a few hundred.

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "gradients": [(shard, gradient.numpy()) for shard, gradient in self.gradients],
            "record": self.record and self.record.map(Tensor.numpy),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.gradients = [(shard, torch.from_numpy(gradient)) for shard, gradient in state["gradients"]]
        self.record = state["record"] and state["record"].map(torch.from_numpy)


@dataclass(frozen=True)
class Step:
    """What is run, on one process or on many. `watched`: keep what goes between operators."""

    model: Model
    workload: Workload
    layout: Layout
    feed: Feed = "packed"
    watched: bool = False

    @property
    def alone(self) -> Step:
        """What it is held against: the same micro-batches, one after the other, on one rank."""
        layout = Layout(micro_batch=self.layout.micro_batch, precision=self.layout.precision)
        return Step(self.model, self.workload, layout, self.feed, self.watched)


def run_step(step: Step, sabotage: Sabotage | None = None) -> Report:
    """Loss, gradients and traffic of one step, before the optimizer."""
    model, workload, layout, feed = step.model, step.workload, step.layout, step.feed
    with sabotage() if sabotage is not None else nullcontext():
        mesh = build_mesh(layout, model, torch.device("cpu"))
        engine = apply(model, workload, mesh, lambda shard: shard.of(initial_weight(model, shard, feed)))
        record = watch(engine.chunks, mesh.ledger) if step.watched else None
        data = rank_batch(model, workload, layout, mesh["dp"].index, feed)
        loss, squared = engine.forward_backward(data).tolist()
        sent = [(*astuple(entry), count, nbytes) for entry, count, nbytes in mesh.ledger.rows()]
        return Report(dict(mesh.coordinates), loss, squared**0.5, list(engine.state.whole_gradients()), sent, record)
