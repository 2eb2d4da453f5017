"""What a rank does in a verification: one step on a fixed batch, and what it computed, sent and passed on between modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.models.init import initial_value
from meshwright.parallel.apply import apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
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


def one_step(
    model: Model, workload: Workload, layout: Layout, sabotage: Sabotage | None = None, watched: bool = False
) -> Report:
    """Loss, gradients and traffic of one step, before the optimizer; if `watched`, also what went between modules."""
    with sabotage() if sabotage is not None else nullcontext():
        mesh = build_mesh(layout, model, torch.device("cpu"))
        engine = apply(model, workload, mesh, lambda shard: shard.of(initial_weight(model, shard)))
        record = watch(engine.chunks) if watched else None
        loss, squared = engine.forward_backward(rank_batch(model, workload, layout, mesh["dp"].index)).tolist()
        sent = [(*astuple(entry), count, nbytes) for entry, count, nbytes in mesh.ledger.rows()]
        return Report(dict(mesh.coordinates), loss, squared**0.5, list(engine.state.whole_gradients()), sent, record)


def one_process(model: Model, workload: Workload, layout: Layout, watched: bool = False) -> Report:
    """What `layout` is held against: the same micro-batches, one after the other, on one rank."""
    return one_step(model, workload, Layout(micro_batch=layout.micro_batch, precision=layout.precision), None, watched)


def initial_weight(model: Model, shard: Shard) -> Tensor:
    """As in training, but with biases and norms off 0 and 1, where mistakes in them would not show."""
    value = initial_value(model, shard.name, shard.global_shape, seed=0)
    return value if value.ndim > 1 else value + initial_value(model, shard.name, (1, *shard.global_shape), seed=1)[0]


def global_batch(model: Model, workload: Workload) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, labels, documents) of each sequence [1, seq]: packed with two documents and padded at the end, to very different
    lengths, so that ranks count different numbers of tokens."""
    generator = torch.Generator().manual_seed(1000)
    out = []
    for i in range(workload.global_batch):
        tokens, labels = (torch.randint(0, model.vocab, (1, workload.seq), generator=generator) for _ in range(2))
        labels[:, workload.seq - (i * 5) % workload.seq :] = -100
        documents = (torch.arange(workload.seq) >= (3 + 7 * i) % workload.seq).long().unsqueeze(0)
        out.append((tokens, labels, documents))
    return out


def rank_batch(model: Model, workload: Workload, layout: Layout, dp_index: int) -> list[tuple[Tensor, ...]]:
    """The micro-batches of one dp rank."""
    per_rank, size = workload.global_batch // layout.dp, layout.micro_batch
    mine = global_batch(model, workload)[dp_index * per_rank :][:per_rank]
    return [tuple(torch.cat(parts) for parts in zip(*mine[i : i + size], strict=True)) for i in range(0, per_rank, size)]
