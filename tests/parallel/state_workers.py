"""What ranks do in the tests of dtypes and of offload. Imported by the rank processes."""

from __future__ import annotations

import torch
import workers

from meshwright.parallel.apply import apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

STEPS = 4


def losses_from_rounded(model: Model, workload: Workload, layout: Layout) -> list[float]:
    """Losses of a few AdamW steps from weights that the compute dtype holds exactly."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[layout.precision]

    def initial(shard: Shard) -> torch.Tensor:
        return shard.of(workers.initial_weight(model, shard).to(dtype).float())  # type: ignore[no-any-return]

    engine = apply(model, workload, build_mesh(layout, model, torch.device("cpu")), initial)
    optimizer = Optimizer(Recipe(steps=STEPS, lr=1e-3, warmup=2, clip=0.5), engine.state)
    out = []
    for step in range(STEPS):
        loss, squared = engine.forward_backward(workers.local_batch(model, workload, engine, step)).tolist()
        optimizer.step(step, squared)
        out.append(loss)
    return out
