"""What a rank does in a verification: one step on a fixed batch, and what it computed, sent and passed on between layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.models.init import initial_value
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload

Sabotage = Callable[[], None]
"""Run in every rank before the engine is built: for tests of the verification itself."""


@dataclass
class Report:
    """Of one rank. `outputs`: of the embedding and of each layer, by name, for each of this rank's micro-batches."""

    coordinates: dict[str, int]
    loss: float
    grad_norm: float
    gradients: list[tuple[Shard, Tensor]]
    outputs: list[dict[str, Tensor]]
    sent: list[tuple[str, str, int, int, int]]


def one_step(model: Model, workload: Workload, layout: Layout, sabotage: Sabotage | None = None) -> Report:
    """Loss, gradients and traffic of one step, before the optimizer."""
    if sabotage is not None:
        sabotage()
    mesh = build_mesh(layout, model, torch.device("cpu"))
    engine = apply(model, workload, mesh, lambda shard: shard.of(initial_weight(model, shard)))
    data = rank_batch(model, workload, layout, mesh["dp"].index)
    outputs: list[dict[str, Tensor]] = [{} for _ in data]
    handles = _watch(engine, outputs)
    loss, squared = engine.forward_backward(data).tolist()
    for handle in handles:
        handle.remove()
    sent = [(*astuple(entry), count, nbytes) for entry, count, nbytes in mesh.ledger.rows()]
    gradients = list(engine.state.whole_gradients())
    return Report(dict(mesh.coordinates), loss, squared**0.5, gradients, outputs, sent)


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


def _watch(engine: Engine, outputs: list[dict[str, Tensor]]) -> list[Any]:
    """Record what leaves the embedding and each layer in its first run for each micro-batch; recomputation runs it again."""

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, output: Tensor) -> None:
            free = next((one for one in outputs if name not in one), None)
            if free is not None:
                free[name] = output.detach().clone()

        return hook

    handles = []
    for chunk in engine.chunks:
        if chunk.embedding is not None:
            handles.append(chunk.embedding.register_forward_hook(record("embedding")))
        handles += [layer.register_forward_hook(record(f"layers.{i}")) for i, layer in chunk.layers.items()]
    return handles
