"""What ranks do in the checkpoint and launch tests. Imported by the rank processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import workers

from meshwright.models.init import initial_value
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload
from meshwright.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe
from meshwright.train.scaler import LossScaler

RECIPE = Recipe(steps=8, lr=1e-3, warmup=2)


def steps(engine: Engine, optimizer: Optimizer, workload: Workload, which: range) -> list[float]:
    out = []
    for step in which:
        loss, squared = engine.forward_backward(workers.local_batch(engine.model, workload, engine, step)).tolist()
        optimizer.step(step, squared)
        out.append(loss)
    return out


def train_and_save(model: Model, workload: Workload, layout: Layout, directory: Path, until: int) -> list[float]:
    engine = workers.build(model, workload, layout)
    optimizer = Optimizer(RECIPE, engine.state)
    losses = steps(engine, optimizer, workload, range(until))
    save_checkpoint(directory, until, {"recipe": {}}, engine.mesh, optimizer)
    return losses


def resume(model: Model, workload: Workload, layout: Layout, directory: Path, until: int) -> list[float]:
    engine = workers.build(model, workload, layout)
    for bucket in engine.state.buckets:  # what is not loaded must show
        for kept in (bucket.parameters, *bucket.state_at_rest):
            kept.fill_(float("nan"))
    optimizer = Optimizer(RECIPE, engine.state)
    path = newest_checkpoint(directory)
    assert path is not None
    about = load_checkpoint(path, engine.mesh, optimizer)
    return steps(engine, optimizer, workload, range(about["step"], until))


def die_at_start() -> None:
    """Rank 1 is gone at once; the others would wait for it for half an hour."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise OSError("the disk of rank 1 is on fire")
    dist.barrier()


def killed_at_start() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)


def accepted_steps(layout: str) -> list[bool]:
    """Whether a step is taken whose gradients overflow on rank 0 alone, and one whose do not."""
    parsed = parse_layout(layout)
    model = Model(
        name="m", family="llama", layers=2, hidden=16, ffn=32, vocab=64, heads=2, kv_heads=2, head_dim=8, max_positions=8
    )  # fmt: skip
    mesh = build_mesh(parsed, model, torch.device("cpu"))
    engine = apply(
        model, Workload(8, 2), mesh, lambda shard: shard.of(initial_value(model, shard.name, shard.global_shape, seed=0))
    )
    tokens = torch.arange(8).unsqueeze(0)
    labels = tokens if mesh.rank == 0 else torch.full_like(tokens, -100)
    out = []
    for scale in (2.0**40, 1.0):
        _, squared = engine.forward_backward([(tokens, labels)], scale).tolist()
        out.append(LossScaler("fp16").accepts(squared))
    return out
