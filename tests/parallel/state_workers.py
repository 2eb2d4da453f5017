"""What ranks do in the tests of dtypes and of offload. Imported by the rank processes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import workers

from meshwright.parallel.apply import apply
from meshwright.parallel.bucket import FlatBucket
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.offload import Record
from meshwright.parallel.units import Unit
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

STEPS = 4
RECIPE = Recipe(steps=STEPS, lr=1e-3, warmup=2, clip=0.5)


def losses_from_rounded(model: Model, workload: Workload, layout: Layout) -> list[float]:
    """Losses of a few AdamW steps from weights that the compute dtype holds exactly."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[layout.precision]

    def initial(shard: Shard) -> torch.Tensor:
        return shard.of(workers.initial_weight(model, shard).to(dtype).float())  # type: ignore[no-any-return]

    engine = apply(model, workload, build_mesh(layout, model, torch.device("cpu")), initial)
    optimizer = Optimizer(RECIPE, engine.state)
    out = []
    for step in range(STEPS):
        loss, squared = engine.forward_backward(workers.local_batch(model, workload, engine, step)).tolist()
        optimizer.step(step, squared)
        out.append(loss)
    return out


def trained(model: Model, workload: Workload, layout: Layout, directory: Path | None = None) -> dict[str, Any]:
    """Losses of a few AdamW steps, the weights and moments of each bucket after them, and what was kept and moved."""
    mesh = build_mesh(layout, model, torch.device("cpu"))
    engine = apply(model, workload, mesh, lambda s: s.of(workers.initial_weight(model, s)), offload_dir=directory)
    optimizer = Optimizer(RECIPE, engine.state)
    losses = []
    for step in range(STEPS):
        before = Counter(engine.state.offload.moved) if engine.state.offload else Counter[str]()
        loss, squared = engine.forward_backward(workers.local_batch(model, workload, engine, step)).tolist()
        optimizer.step(step, squared)
        losses.append(loss)
    out: dict[str, Any] = {
        "stage": mesh.stage,
        "seat": astuple(mesh.seat),
        "losses": losses,
        "state": [[kept.clone() for kept in bucket.state_at_rest] for bucket in engine.state.buckets],
        "resident": {
            "parameters": sum(bucket.parameter_bytes for bucket in engine.state.buckets),
            "gradients": sum(bucket.gradients.nbytes for bucket in engine.state.buckets),
            "optimizer": optimizer.state_bytes(),
        },
        "units": sum(
            buffer.nbytes
            for (_, dtype), free in engine.state.buffers._free.items()
            for buffer in free
            if dtype == engine.state.buckets[0].compute_dtype
        ),
    }
    if (offload := engine.state.offload) is not None:
        out |= {"moved": dict(offload.moved - before), "kept": offload.kept_bytes, "working": offload.working_bytes}
        out["files"] = sum(os.fstat(d).st_size for d in offload._descriptors)
        offload.close()
    return out


def moves(model: Model, workload: Workload, layout: Layout) -> list[tuple[str, int]]:
    """What happened in a step, in order: reads and writes as they are asked for, updates of buckets, uses of units (numbered in the
    order in which they are first needed)."""
    events: list[tuple[str, int]] = []
    engine = workers.build(model, workload, layout)
    optimizer = Optimizer(RECIPE, engine.state)
    offload = engine.state.offload
    assert offload is not None
    kinds: dict[int, tuple[str, int]] = {}
    for index, bucket in enumerate(engine.state.buckets):
        kinds[id(bucket.away)] = ("optimizer", index)
    units: dict[int, int] = {}
    submit, update, bring, fetch = offload.submit, optimizer._update, Unit.bring, Unit.fetch

    def numbered(unit: Unit) -> int:
        return units.setdefault(id(unit), len(units))

    def submitted(record: Record, tensor: torch.Tensor, *, write: bool) -> Any:
        if id(record) in kinds:
            kind, index = kinds[id(record)]
            events.append((f"{'write' if write else 'read'} {kind}", index))
        return submit(record, tensor, write=write)

    def updated(bucket: FlatBucket, *rest: Any) -> None:
        events.append(("update", bucket.index))
        update(bucket, *rest)

    def fetched(unit: Unit) -> None:
        before = offload.moved["read"]
        fetch(unit)
        if offload.moved["read"] > before:
            events.append(("read unit", numbered(unit)))

    def brought(unit: Unit) -> None:
        bring(unit)
        events.append(("bring", numbered(unit)))

    offload.submit, optimizer._update = submitted, updated  # type: ignore[method-assign, assignment]
    Unit.fetch, Unit.bring = fetched, brought  # type: ignore[method-assign]
    try:
        _, squared = engine.forward_backward(workers.local_batch(model, workload, engine)).tolist()
        optimizer.step(0, squared)
    finally:
        Unit.fetch, Unit.bring = fetch, bring  # type: ignore[method-assign]
    return events
