"""What a rank holds, counted: every storage that an operator makes, for as long as it lives. Imported by the rank processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshwright.models.init import initial_value
from meshwright.parallel import pipeline
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import Mesh, build_mesh
from meshwright.schedule.actions import Action
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

SETTLED = 0.05
"""Seconds without a change. A thread of gloo lets go of a collective's tensors a moment after it has reported the end, so that what
is counted at once may be more than what stays."""


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that operators make inside it, without keeping it; not those that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes, each storage once, when nothing changes any more."""
        before, now = -1, self._alive_now()
        while now != before:
            time.sleep(SETTLED)
            before, now = now, self._alive_now()
        return now

    def _alive_now(self) -> int:
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        return sum(self.sizes.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Held:
    """Bytes that one rank holds. `seat`: its places on tp, ep and etp."""

    stage: int
    seat: tuple[int, int, int]
    kept: int
    """Parameters, gradients and optimizer state alone, by the sizes of their tensors."""
    state: int
    """Alive between two steps: these, and buffers."""
    activations: int
    """The most that is alive at the end of a forward, of a chunk and a micro-batch, beyond that and beyond what is on its way between
    stages."""
    passing: int = field(default=0)
    """The most of what was on its way then."""


def held(model: Model, workload: Workload, layout: Layout) -> Held:
    """What this rank holds in the second step of a training."""
    mesh = build_mesh(layout, model, torch.device("cpu"))
    data = [batches(mesh, model, workload, step) for step in range(2)]
    with LiveStorages() as live:
        engine = apply(
            model, workload, mesh, lambda shard: shard.of(initial_value(model, shard.name, shard.global_shape, 0))
        )
        optimizer = Optimizer(Recipe(), engine.state)
        train_step(engine, optimizer, 0, data[0])
        state = live.alive()
        with _after_forwards(live, state) as (activations, passing):
            train_step(engine, optimizer, 1, data[1])
    kept = (
        sum(bucket.parameters.nbytes + bucket.gradients.nbytes for bucket in engine.state.buckets) + optimizer.state_bytes()
    )
    seat = mesh.seat
    return Held(mesh.stage, (seat.tp, seat.ep, seat.etp), kept, state, max(activations), max(passing))


def batches(mesh: Mesh, model: Model, workload: Workload, step: int) -> list[list[Tensor]]:
    """Tokens and labels of each micro-batch."""
    layout = mesh.layout
    generator = torch.Generator().manual_seed(1000 * step + mesh["dp"].index)
    shape = (layout.micro_batch, workload.seq)
    return [
        [torch.randint(0, model.vocab, shape, generator=generator) for _ in range(2)]
        for _ in range(workload.global_batch // (layout.dp * layout.micro_batch))
    ]


def train_step(engine: Engine, optimizer: Optimizer, step: int, data: list[list[Tensor]]) -> None:
    _, squared = engine.forward_backward(data).tolist()
    optimizer.step(step, squared)


@contextmanager
def _after_forwards(live: LiveStorages, state: int) -> Iterator[tuple[list[int], list[int]]]:
    """Counts at the end of every forward inside: bytes of activations, and of what is on its way between stages."""
    activations, passing = [], []
    forward = pipeline.Step.forward

    def counted(step: pipeline.Step, action: Action) -> None:
        forward(step, action)
        passing.append(_on_the_way(step))
        activations.append(live.alive() - state - passing[-1])

    pipeline.Step.forward = counted  # type: ignore[method-assign]
    try:
        yield activations, passing
    finally:
        pipeline.Step.forward = forward  # type: ignore[method-assign]


def _on_the_way(step: pipeline.Step) -> int:
    """Bytes that wait to be sent or have just come: a received input belongs to the forward that reads it once that has run."""
    waiting = [tensor for part, tensor in step.inputs.items() if part not in step.graphs]
    tensors = [*step.outgoing.values(), *step.gradients.values(), *waiting, *(tensor for _, tensor in step.leaving)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
