"""What ranks do in the parity tests: build the engine, run steps, hand back what they hold. Imported by the rank processes."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist

from meshwright.models.init import initial_value
from meshwright.models.routing import Balance
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

Gradients = list[tuple[Shard, torch.Tensor]]


def build(model: Model, workload: Workload, layout: Layout, balance: Balance | None = None) -> Engine:
    mesh = build_mesh(layout, model, torch.device("cpu"))
    return apply(model, workload, mesh, lambda shard: shard.of(initial_weight(model, shard)), balance)


def initial_weight(model: Model, shard: Shard) -> torch.Tensor:
    """As in training, but with biases and norms off 0 and 1, where mistakes in them would not show."""
    value = initial_value(model, shard.name, shard.global_shape, seed=0)
    return value if value.ndim > 1 else value + initial_value(model, shard.name, (1, *shard.global_shape), seed=1)[0]


def global_batch(model: Model, workload: Workload, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of each sequence, padded to very different lengths: ranks count different numbers of tokens."""
    generator = torch.Generator().manual_seed(1000 + step)
    out = []
    for i in range(workload.global_batch):
        tokens = torch.randint(0, model.vocab, (1, workload.seq), generator=generator)
        labels = torch.randint(0, model.vocab, (1, workload.seq), generator=generator)
        labels[:, workload.seq - (i * 5) % workload.seq :] = -100
        out.append((tokens, labels))
    return out


def local_batch(model: Model, workload: Workload, engine: Engine, step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layout = engine.mesh.layout
    per_rank = workload.global_batch // layout.dp
    mine = global_batch(model, workload, step)[engine.mesh["dp"].index * per_rank :][:per_rank]
    size = layout.micro_batch
    return [
        (torch.cat([t for t, _ in mine[i : i + size]]), torch.cat([y for _, y in mine[i : i + size]]))
        for i in range(0, per_rank, size)
    ]


def gradients_of_step_1(model: Model, workload: Workload, layout: Layout) -> tuple[list[float], Gradients]:
    """([loss, squared gradient norm], this rank's gradients)."""
    engine = build(model, workload, layout)
    figures = engine.forward_backward(local_batch(model, workload, engine)).tolist()
    return figures, list(engine.state.whole_gradients())


def losses(model: Model, workload: Workload, layout: Layout, steps: int, balance: Balance | None = None) -> list[float]:
    """The loss of every step of a short training with AdamW, warm-up and clipping."""
    engine = build(model, workload, layout, balance)
    optimizer = Optimizer(Recipe(steps=steps, lr=1e-3, warmup=5, clip=0.5), engine.state)
    out = []
    for step in range(steps):
        loss, squared = engine.forward_backward(local_batch(model, workload, engine, step % 4)).tolist()
        optimizer.step(step, squared)
        if balance is not None:
            engine.balance_experts()
        out.append(loss)
    return out


def held_and_sent(model: Model, workload: Workload, layout: Layout) -> dict[str, Any]:
    """Bytes of state, the ledger of the first step, and the calls that reached torch.distributed beside it."""
    with counted_calls() as calls:
        engine = build(model, workload, layout)
        optimizer = Optimizer(Recipe(), engine.state)
        calls.clear()
        _, squared = engine.forward_backward(local_batch(model, workload, engine)).tolist()
        optimizer.step(0, squared)
        calls_of_step = list(calls)
    state = engine.state
    return {
        "stage": engine.mesh.stage,
        "seat": astuple(engine.mesh.seat),
        "ledger": [(e.axis, e.op, e.group_size, count, nbytes) for e, count, nbytes in engine.mesh.ledger.rows()],
        "calls": calls_of_step,
        "state": {
            "parameters": sum(b.parameters.nbytes for b in state.buckets),
            "gradients": sum(b.gradients.nbytes for b in state.buckets),
            "optimizer": optimizer.state_bytes(),
        },
        "held_by_module": sum(p.nbytes for p in {id(p): p for c in engine.chunks for p in c.parameters()}.values()),
    }


class counted_calls:
    """Wraps the functions of torch.distributed that the collectives call, so that the ledger has a witness."""

    def __enter__(self) -> list[tuple[str, int]]:
        from meshwright.parallel import collectives

        self.calls: list[tuple[str, int]] = []
        self.originals = [
            (dist, "all_reduce", dist.all_reduce, 0),
            (collectives, "_all_gather", collectives._all_gather, 0),
            (collectives, "_reduce_scatter", collectives._reduce_scatter, 1),
            (dist, "batch_isend_irecv", dist.batch_isend_irecv, None),
        ]
        for module, name, original, index in self.originals:
            setattr(module, name, self._wrap(name, original, index))
        return self.calls

    def __exit__(self, *_: object) -> None:
        for module, name, original, _ in self.originals:
            setattr(module, name, original)

    def _wrap(self, name: str, original: Any, index: int | None) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if index is None:
                self.calls.extend(("send", op.tensor.nbytes) for op in args[0] if op.op is dist.isend)
            else:
                self.calls.append((name.lstrip("_"), args[index].nbytes))
            return original(*args, **kwargs)

        return wrapped
