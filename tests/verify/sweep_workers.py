"""What ranks do in the tests of the sweep."""

from __future__ import annotations

import torch

from meshwright.parallel.apply import apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload
from meshwright.verify.feed import Feed, initial_weight, rank_batch


def rows_of_experts(model: Model, workload: Workload, layout: Layout, feed: Feed) -> list[list[int]]:
    """What this rank's tokens sent to each expert of each layer in one step."""
    mesh = build_mesh(layout, model, torch.device("cpu"))
    engine = apply(model, workload, mesh, lambda shard: shard.of(initial_weight(model, shard, feed)))
    engine.forward_backward(rank_batch(model, workload, layout, mesh["dp"].index, feed))
    return [moe.load_E.tolist() for moe in engine.moes if moe.load_E is not None]
