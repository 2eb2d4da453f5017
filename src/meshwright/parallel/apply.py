"""Turns a plain model into one rank's share of it, in order. The model itself knows nothing of this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from meshwright.models.attention import Where
from meshwright.models.decoder import Decoder, cross_entropy
from meshwright.models.mlp import SharedInput
from meshwright.models.moe import MoE
from meshwright.models.routing import Balance
from meshwright.parallel.balance import apply_balance, summed_load, update_selection_bias
from meshwright.parallel.bucket import DTYPE
from meshwright.parallel.context import ContextParallelCore, cut_tokens, cut_where
from meshwright.parallel.data import DataParallel
from meshwright.parallel.expert import apply_expert_parallel
from meshwright.parallel.fp8 import Fp8Weight, is_eligible, refuse_fp8
from meshwright.parallel.linear import Linear, Linears, WeightGradients
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.offload import make_offload
from meshwright.parallel.pipeline import MicroBatch, Pipeline
from meshwright.parallel.recompute import recompute_layers, recompute_parts
from meshwright.parallel.tensor import apply_tensor_parallel
from meshwright.parallel.units import absent, bring_parameters
from meshwright.parallel.vocab import vocab_parallel_cross_entropy, vocab_start
from meshwright.schedule.actions import Schedule
from meshwright.schedule.buckets import plan_buckets
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import rank_shards, stage_chunks
from meshwright.spec.layout import Precision
from meshwright.spec.legality import check_layout, micro_batches, refuse_unbuilt, refuse_unrun
from meshwright.spec.model import Model
from meshwright.spec.shards import TIED_NAME, Shard
from meshwright.spec.workload import Workload

Sequences = Sequence[Tensor]
"""Token ids [B, S], labels [B, S] (label -100 is ignored) and, for packed sequences, each token's document [B, S]."""


class Engine:
    """One rank's share of a model under a layout: the pipeline that runs it and the state that it updates."""

    def __init__(self, model: Model, mesh: Mesh, chunks: list[Decoder], pipeline: Pipeline, state: DataParallel):
        self.model, self.mesh, self.chunks, self.pipeline, self.state = model, mesh, chunks, pipeline, state
        layers = [layer for chunk in chunks for layer in chunk.layers.values()]
        self.moes: list[MoE] = [layer.moe for layer in layers if layer.moe is not None]
        self.loads: tuple[Tensor, Tensor] | None = None
        """What each expert got in the last step, and what was dropped; see `balance.summed_load`."""

    def forward_backward(self, data: Sequence[Sequences], loss_scale: float = 1.0) -> Tensor:
        """`gradients`, and [mean loss, squared gradient norm] of the global batch, equal on every rank.

        With a `loss_scale` the gradients stay scaled; the figures are not.
        """
        loss = self.gradients(data, loss_scale).double() / loss_scale
        norm = self.state.squared_norm() / loss_scale**2
        figures = torch.stack((loss * (self.mesh["tp"].index == 0), norm))
        return self.mesh.sum_over(figures)

    def gradients(self, data: Sequence[Sequences], loss_scale: float = 1.0) -> Tensor:
        """Gradients of the mean loss over all counted tokens of the global batch, whatever each rank's share of them.

        `data`: this dp rank's micro-batches, whole sequences. Returns this rank's part of the mean loss, times `loss_scale`; it is
        zero but on the stage that holds the head.
        """
        self.state.begin_step(len(data))
        self._begin_experts(len(data), loss_scale)
        counted = torch.stack([(labels != -100).sum() for _, labels, *_ in data]).sum().double()
        self.mesh["dp"].all_reduce(counted)
        scale = (loss_scale / counted).to(self.pipeline.loss_dtype)
        loss = self.pipeline.run([self._share(*sequences) for sequences in data], scale)
        self.state.finish_step()
        return loss

    def balance_experts(self) -> None:
        """After a step: sum up what the experts got, and move their selection biases if that was asked for.

        The tokens of all ranks but those of other stages count.
        """
        self.loads = summed_load(self.moes, [self.mesh[axis] for axis in ("tp", "cp", "dp")])
        if self.moes and self.moes[0].balance and (rate := self.moes[0].balance.bias_rate):
            update_selection_bias(self.moes, self.loads[0], rate)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """By global name, what this stage keeps beside its parameters: the selection biases of routers."""
        return {
            f"layers.{name}.moe.router.selection_bias": layer.moe.router.selection_bias
            for chunk in self.chunks
            for name, layer in chunk.layers.items()
            if layer.moe is not None and layer.moe.router.selection_bias is not None
        }

    def _begin_experts(self, micro_batches: int, loss_scale: float) -> None:
        """The losses of routers are means over the sequences of the global batch."""
        layout = self.mesh.layout
        for moe in self.moes:
            moe.clear_load()
            moe.loss_scale = loss_scale / (micro_batches * layout.micro_batch * layout.dp)

    def _share(self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None) -> MicroBatch:
        """This cp rank's tokens of whole sequences."""
        layout, index = self.mesh.layout, self.mesh["cp"].index
        if layout.cp == 1:
            return MicroBatch(tokens, labels, Where(documents_BS=documents))
        where = cut_where(documents, tokens.shape[1], layout, index, tokens.device)
        return MicroBatch(cut_tokens(tokens, layout, index), cut_tokens(labels, layout, index), where)


def apply(
    model: Model,
    workload: Workload,
    mesh: Mesh,
    initial: Callable[[Shard], Tensor],
    balance: Balance | None = None,
    schedule: Schedule | None = None,
    offload_dir: Path | None = None,
) -> Engine:
    """This rank's share of `model`. `initial` gives each shard's first values; `balance`: how experts are kept in balance;
    `schedule`: instead of the one that the layout names, for as many stages and chunks; `offload_dir`: where offload to files keeps them,
    the system's temporary directory by default.

    Raises UserError for a layout that the model or the workload cannot be split by.
    """
    layout, gradients = mesh.layout, WeightGradients()
    check_layout(layout, model, workload)
    refuse_unbuilt(layout)
    refuse_unrun(layout)
    if layout.precision == "fp8":
        refuse_fp8(mesh.device)
    with torch.device("meta"):
        chunks = [
            Decoder(model, chunk.layers, first=chunk.first, last=chunk.last)
            for chunk in stage_chunks(model.layers, layout)[mesh.stage]
        ]
    for chunk, decoder in enumerate(chunks):
        lane = mesh.lane(chunk)
        if layout.tp > 1:
            apply_tensor_parallel(
                decoder,
                lane["tp"],
                gradients,
                sequence=layout.sp,
                micro_batch=layout.micro_batch,
                overlap=layout.async_tp,
            )
        _split_experts(decoder, lane, gradients, balance, workload.seq)
        _keep_weight_gradients(decoder, gradients)
        recompute_parts(decoder, layout)
        if layout.cp > 1:
            _split_attention(decoder, lane)
        recompute_layers(decoder, layout)
    buckets = plan_buckets(rank_shards(model, layout, mesh.stage, mesh.seat), layout)
    state = DataParallel(buckets, mesh, make_offload(mesh, offload_dir))
    parameters, uses = _materialise(chunks, model, state)
    state.attach(parameters, uses, gradients)
    _fill(state, initial)
    if not all(bucket.is_ready_to_use for bucket in state.buckets):
        for decoder in chunks:
            bring_parameters(decoder, state, parameters, last_stays=layout.pp == 1)
    pipeline = Pipeline(
        chunks,
        schedule or layout_schedule(layout, micro_batches(layout, workload)),
        mesh["pp"],
        _loss(model, mesh.lane(next((i for i, decoder in enumerate(chunks) if decoder.head is not None), 0))),
        _boundary(model, workload, mesh),
        DTYPE[layout.precision],
        gradients,
    )
    return Engine(model, mesh, chunks, pipeline, state)


def _split_experts(decoder: Decoder, mesh: Mesh, gradients: WeightGradients, balance: Balance | None, seq: int) -> None:
    layout = mesh.layout
    if balance is not None:
        balance.check(decoder.model)
    for layer in decoder.layers.values():
        if layer.moe is not None:
            apply_expert_parallel(
                layer.moe,
                mesh["ep"],
                mesh["tp"],
                gradients,
                etp=layout.etp,
                sequence=layout.sp,
                micro_batch=layout.micro_batch,
                overlap=layout.async_tp,
            )
            if balance is not None:
                apply_balance(layer.moe, balance, mesh, seq)


def _keep_weight_gradients(decoder: Decoder, gradients: WeightGradients) -> None:
    """Plain linears that tensor parallelism has left."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is SharedInput:
                setattr(module, name, Linears(child, gradients))
            elif type(child) is nn.Linear and not isinstance(module, nn.ModuleDict):
                setattr(module, name, Linear(child, gradients))


def _materialise(
    chunks: list[Decoder], model: Model, state: DataParallel
) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
    """Replace the meta parameters by views of the flat buckets. Returns them by global name, and how often each is used."""
    made: dict[str, nn.Parameter] = {}
    precision = state.mesh.layout.precision
    for bucket in state.buckets:
        if bucket.is_ready_to_use:
            made |= {name: _parameter(name, view, precision) for name, view in bucket.views(bucket.parameters)}
        else:
            made |= {
                s.name: _parameter(s.name, absent(s.shape, bucket.compute_dtype, bucket.device), precision)
                for s in bucket.plan.shards
            }
    uses: Counter[str] = Counter()
    for chunk in chunks:
        for path, module in chunk.named_modules():
            for local in [local for local, parameter in module._parameters.items() if parameter is not None]:
                name = f"{path}.{local}" if path else local
                if name == "head.weight" and model.tied:
                    name = TIED_NAME
                module.register_parameter(local, made[name])
                uses[name] += 1
            for local, buffer in module._buffers.items():
                if buffer is not None:
                    module.register_buffer(local, torch.zeros_like(buffer, device=state.mesh.device))
    return made, uses


def _parameter(name: str, value: Tensor, precision: Precision) -> nn.Parameter:
    kind = Fp8Weight if precision == "fp8" and is_eligible(name, tuple(value.shape)) else nn.Parameter
    return kind(value)


def _fill(state: DataParallel, initial: Callable[[Shard], Tensor]) -> None:
    with torch.no_grad():
        for bucket in state.buckets:
            for shard, offset in zip(bucket.plan.shards, bucket.plan.offsets, strict=True):
                bucket.fill(shard, offset, initial(shard))
            if bucket.master is not None:
                bucket.master.copy_(bucket.own_parameters)


def _loss(model: Model, mesh: Mesh) -> Callable[[Tensor, Tensor], Tensor]:
    if mesh.layout.tp == 1:
        return cross_entropy
    return partial(vocab_parallel_cross_entropy, start=vocab_start(model.vocab, mesh["tp"]), group=mesh["tp"])


def _boundary(model: Model, workload: Workload, mesh: Mesh) -> tuple[int, ...]:
    """Shape of the hidden states that cross a stage boundary on this rank."""
    layout = mesh.layout
    length = workload.seq // layout.cp
    if layout.sp:
        return (layout.micro_batch * length // layout.tp, model.hidden)
    return (layout.micro_batch, length, model.hidden)


def _split_attention(decoder: Decoder, mesh: Mesh) -> None:
    for layer in decoder.layers.values():
        layer.attention.core = ContextParallelCore(layer.attention.core, mesh["ring"], mesh["ulysses"])
