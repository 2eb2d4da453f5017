"""Turns a plain model into one rank's share of it, in order. The model itself knows nothing of this."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.models.decoder import Decoder, cross_entropy
from meshwright.parallel.data import PARAMETER_DTYPE, DataParallel
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline import Pipeline
from meshwright.parallel.tensor import apply_tensor_parallel
from meshwright.parallel.vocab import vocab_parallel_cross_entropy, vocab_start
from meshwright.schedule.buckets import plan_buckets
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import stage_layers
from meshwright.spec.legality import check_layout, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.shards import TIED_NAME, Shard, stage_shards
from meshwright.spec.workload import Workload


class Engine:
    """One rank's share of a model under a layout: the pipeline that runs it and the state that it updates."""

    def __init__(self, model: Model, mesh: Mesh, stage: nn.Module, pipeline: Pipeline, state: DataParallel):
        self.model, self.mesh, self.stage, self.pipeline, self.state = model, mesh, stage, pipeline, state

    def forward_backward(self, data: list[tuple[Tensor, Tensor]]) -> Tensor:
        """`gradients`, and [mean loss, squared gradient norm] of the global batch, equal on every rank."""
        loss = self.gradients(data)
        alone = self.mesh["tp"].index == 0 and self.mesh["cp"].index == 0
        figures = torch.stack((loss.double() * alone, self.state.squared_norm()))
        return self.mesh.sum_over(figures)

    def gradients(self, data: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Gradients of the mean loss over all counted tokens of the global batch, whatever each rank's share of them.

        `data`: this dp rank's micro-batches. Returns this dp rank's part of the mean loss on the last stage, zero elsewhere.
        """
        self.state.begin_step()
        counted = torch.stack([(labels != -100).sum() for _, labels in data]).sum().double()
        self.mesh["dp"].all_reduce(counted)
        scale = (1.0 / counted).to(self.pipeline.loss_dtype)
        loss = self.pipeline.run(data, scale, self.state.begin_last_micro_batch)
        self.state.finish_step()
        return loss


def apply(model: Model, workload: Workload, mesh: Mesh, initial: Callable[[Shard], Tensor]) -> Engine:
    """This rank's share of `model`. `initial` gives each shard's first values.

    Raises UserError for a layout that the model or the workload cannot be split by.
    """
    layout = mesh.layout
    check_layout(layout, model, workload)
    refuse_unbuilt(layout)
    layers = stage_layers(model.layers, layout.pp)[mesh.stage]
    with torch.device("meta"):
        stage = Decoder(model, layers, first=mesh.is_first_stage, last=mesh.is_last_stage)
    if layout.tp > 1:
        apply_tensor_parallel(stage, mesh["tp"], sequence=layout.sp, micro_batch=layout.micro_batch)
    if layout.recompute == "full":
        _recompute_layers(stage)
    shards = stage_shards(model, layout, mesh.is_first_stage, mesh.is_last_stage, layers, mesh["tp"].index)
    state = DataParallel(_plan(shards, mesh), mesh)
    parameters = _materialise(stage, model, state)
    state.attach(parameters)
    _fill(state, shards, initial)
    pipeline = Pipeline(
        stage,
        layout_schedule(layout, workload.global_batch // (layout.dp * layout.micro_batch)),
        mesh["pp"],
        _loss(model, mesh),
        _boundary(model, workload, mesh),
        PARAMETER_DTYPE[layout.precision],
    )
    return Engine(model, mesh, stage, pipeline, state)


def _plan(shards: tuple[Shard, ...], mesh: Mesh) -> tuple:  # type: ignore[type-arg]
    layout = mesh.layout
    size = STATE_BYTES[layout.precision].gradient
    return plan_buckets(shards, ranks=layout.dp, cuts=layout.state_shards, element_bytes=size)


def _materialise(stage: nn.Module, model: Model, state: DataParallel) -> dict[str, nn.Parameter]:
    """Replace the meta parameters by views of the flat buckets. Returns them by global name."""
    made = {name: nn.Parameter(view) for bucket in state.buckets for name, view in bucket.views(bucket.parameters)}
    for path, module in stage.named_modules():
        for local in list(module._parameters):
            name = f"{path}.{local}" if path else local
            if name == "head.weight" and model.tied:
                name = TIED_NAME
            if module._parameters[local] is not None:
                module.register_parameter(local, made[name])
    return made


def _fill(state: DataParallel, shards: tuple[Shard, ...], initial: Callable[[Shard], Tensor]) -> None:
    by_name = {shard.name: shard for shard in shards}
    with torch.no_grad():
        for bucket in state.buckets:
            for name, view in bucket.views(bucket.parameters):
                view.copy_(initial(by_name[name]))
            if bucket.has_master:
                bucket.weights.copy_(bucket.parameters[bucket.owned])


def _loss(model: Model, mesh: Mesh) -> Callable[[Tensor, Tensor], Tensor]:
    if mesh.layout.tp == 1:
        return cross_entropy
    return partial(vocab_parallel_cross_entropy, start=vocab_start(model.vocab, mesh["tp"]), group=mesh["tp"])


def _boundary(model: Model, workload: Workload, mesh: Mesh) -> tuple[int, ...]:
    layout = mesh.layout
    if layout.sp:
        return (layout.micro_batch * workload.seq // layout.tp, model.hidden)
    return (layout.micro_batch, workload.seq, model.hidden)


def _recompute_layers(stage: Decoder) -> None:
    for layer in stage.layers.values():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
