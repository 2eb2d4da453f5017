"""What ranks do in the parity tests: build the engine, run one step, hand back global gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist

from meshwright.models.init import initial_value
from meshwright.parallel.apply import Engine, apply
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload


def cut(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    return whole if shard.dim is None else whole.narrow(shard.dim, shard.start, shard.length)


def build(model: Model, workload: Workload, layout: Layout, seed: int = 0) -> Engine:
    mesh = build_mesh(layout, model, torch.device("cpu"))
    return apply(model, workload, mesh, lambda shard: cut(initial_value(model, shard.name, shard.global_shape, seed), shard))


def global_batch(model: Model, workload: Workload, step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (tokens, labels) a sequence; padded to very different lengths, so ranks count different numbers of tokens."""
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
    batch = global_batch(model, workload, step)
    per_rank = workload.global_batch // layout.dp
    mine = batch[engine.mesh["dp"].index * per_rank :][:per_rank]
    mb = layout.micro_batch
    return [tuple(torch.cat(parts) for parts in zip(*mine[i : i + mb], strict=True)) for i in range(0, per_rank, mb)]


def shard_gradients(engine: Engine) -> list[tuple[Shard, torch.Tensor]]:
    """This rank's whole shards of the finished gradients; under ZeRO-1 gathered from the dp ranks."""
    out = []
    for bucket in engine.state.buckets:
        flat = bucket.gradients
        if engine.mesh.layout.state_shards > 1:
            flat = torch.empty_like(bucket.gradients)
            dist.all_gather_into_tensor(flat, bucket.weights.grad.contiguous(), group=engine.mesh["dp"].handle)
        by_name = {shard.name: shard for shard in bucket.plan.shards}
        out += [(by_name[name], view.clone()) for name, view in bucket.views(flat)]
    return out


def gradients_of_step(model: Model, workload: Workload, layout: Layout):
    """(loss, squared gradient norm, shards with gradients, ledger rows) of step 1 on this rank."""
    engine = build(model, workload, layout)
    figures = engine.forward_backward(local_batch(model, workload, engine))
    return figures, shard_gradients(engine), engine.mesh.ledger.rows()


def assemble(ranks: list[list[tuple[Shard, torch.Tensor]]]) -> dict[str, list[tuple[Shard, torch.Tensor]]]:
    """Every rank's piece of each global parameter."""
    out: dict[str, list[tuple[Shard, torch.Tensor]]] = {}
    for pieces in ranks:
        for shard, tensor in pieces:
            out.setdefault(shard.name, []).append((shard, tensor))
    return out
