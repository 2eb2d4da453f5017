"""Runs one step of any rank of any world in this process: the real engine on fake tensors and a fake process group.

A fake tensor has a shape, a dtype and a device, but no memory; the fake group answers every collective at once. Routers are taken to send
each expert an equal share, as the cost model does: what they would choose depends on values, which there are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.models.attention import AttentionCore
from meshwright.models.moe import LocalDispatch
from meshwright.parallel.apply import Engine, Sequences, apply
from meshwright.parallel.expert import ExpertParallelDispatch
from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.pipeline import MicroBatch, Pipeline
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import alike_stages
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.precision import NARROW
from meshwright.spec.workload import Workload
from meshwright.trace.groups import followed
from meshwright.trace.kernels import narrow_attention
from meshwright.trace.paths import Paths
from meshwright.trace.recorder import Recorder, without_collector
from meshwright.trace.result import Change, Section, StageTrace, Work
from meshwright.trace.step import Plan, TracedStep
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

CPU = torch.device("cpu")
"""The only device of the fake process group."""
SQUARED_NORM = 4.0
"""Of the gradients, in place of one that nobody computes: above the default clip, so that they are clipped."""


def trace_ranks(
    model: Model,
    layout: Layout,
    workload: Workload,
    ranks: Sequence[int],
    *,
    progress: Callable[[str], None] | None = None,
    every_micro_batch: bool = False,
) -> tuple[StageTrace, ...]:
    """One step of each of `ranks`. `every_micro_batch`: run all of them; by default those that are alike are run once and replayed.

    Stages that hold the same kinds of layers, at the same other coordinates, are run once too, and each is replayed in its own order.
    Raises UserError for a layout that cannot be run here, and for ranks outside of it.
    """
    check_layout(layout, model, workload)
    refuse_unbuilt(layout)
    _refuse_untraced(layout)
    every_micro_batch = every_micro_batch or _are_entangled(layout, micro_batches(layout, workload))
    grid, alike = Grid(layout), {s: members for members in alike_stages(model, layout) for s in members}
    known: dict[object, _Known] = {}
    out = []
    for rank in ranks:
        here = grid.coordinates(rank)
        stage = here.pop("pp")
        key = (alike[stage], tuple(here.items()))
        if progress is not None:
            progress(f"rank {rank}, stage {stage}")
        with _fake_world(layout.world, rank):
            if key not in known or every_micro_batch:
                traced, known[key] = _run(model, layout, workload, rank, stage, every_micro_batch)
            else:
                traced = _replay(model, layout, workload, rank, stage, known[key])
        out.append(traced)
    return tuple(out)


def _are_entangled(layout: Layout, micro_batches: int) -> bool:
    """Whether what one micro-batch does depends on which others are between its forward and the end of its backward. From ZeRO-2 on
    gradients pass through buffers and reductions that all share: chunks may fill one bucket together, and where backward is split, one
    micro-batch's half comes between those of others."""
    return layout.zero >= 2 and (layout.chunks > 1 or layout_schedule(layout, micro_batches).splits_backward)


class _Known:
    """What a stage has shown, for stages like it."""

    def __init__(self, sections: list[Section], posted: int, plan: Plan, pipeline: Pipeline):
        self.posted = posted
        self.before, self.after, self.done = sections[: plan.first], sections[plan.last :], plan.done
        self.boundary, self.dtype, self.loss = pipeline.boundary, pipeline.dtype, pipeline.loss


def _run(
    model: Model, layout: Layout, workload: Workload, rank: int, stage: int, everything: bool
) -> tuple[StageTrace, _Known]:
    recorder = Recorder()
    mesh = followed(build_mesh(layout, model, CPU), recorder)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, without_collector():
        recorder.start("build", category="buffers")
        engine = apply(model, workload, mesh, lambda shard: torch.empty(shard.shape))
        optimizer = Optimizer(Recipe(), engine.state)
        _classify_state(recorder, engine, optimizer)
        _balance_experts(engine, layout, workload)
        _stand_in_for_kernels(engine, recorder)
        _remember_paths(engine.pipeline.weights, recorder.paths)
        plan = Plan(engine.pipeline.schedule, stage, everything=everything)
        engine.pipeline.step_type = partial(TracedStep, recorder, plan)  # type: ignore[assignment]
        begin = engine.state.begin_step
        engine.state.begin_step = lambda _: begin(len(plan.run))  # type: ignore[method-assign]
        recorder.stop()
        recorder.sections = [Section("state", Work([Change(storage, +1) for storage in recorder.live]), Work())]
        with recorder.paths.followed(engine.chunks):
            recorder.start("begin", category="data")
            data = _data(layout, workload)
            figures = engine.forward_backward(data)
            recorder.start("optimizer")
            with recorder.paths.at("optimizer"):
                optimizer.step(0, SQUARED_NORM)
        recorder.stop()
        for storage in recorder.live:
            if storage.category == "activations":  # what outlives the step: tables of angles, counters of experts
                storage.category = "buffers"
        sections = _with_buffers_of_the_step_before(recorder)
        known = _Known(sections, recorder.posted, plan, engine.pipeline)
        del data, figures
    return StageTrace(stage, rank, tuple(sections)), known


def _with_buffers_of_the_step_before(recorder: Recorder) -> list[Section]:
    """The sections of any step but the first: buffers that are kept for the next of their size are there from the start."""
    stays, (state, *rest) = recorder.staying, recorder.sections
    for work in {part for section in rest for part in section.parts}:
        work.events = [event for event in work.events if not (isinstance(event, Change) and event.storage in stays)]
    there = [Change(storage, +1) for storage in recorder.live if storage in stays]
    return [Section(state.name, Work([*state.work.events, *there]), Work()), *rest]


def _replay(model: Model, layout: Layout, workload: Workload, rank: int, stage: int, known: _Known) -> StageTrace:
    recorder = Recorder()
    recorder.posted = known.posted  # numbers of calls in what is replayed are not given again
    mesh = followed(build_mesh(layout, model, CPU), recorder)
    schedule = layout_schedule(layout, micro_batches(layout, workload))
    empty = [nn.Identity() for _ in range(schedule.chunks)]
    pipeline = Pipeline(empty, schedule, mesh["pp"], known.loss, known.boundary, known.dtype, WeightGradients())
    plan = Plan(schedule, stage, known.done)
    pipeline.step_type = partial(TracedStep, recorder, plan)  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, without_collector():
        tokens = torch.empty(0)
        pipeline.run([MicroBatch(tokens, tokens)] * schedule.micro_batches, tokens)
    return StageTrace(stage, rank, (*known.before, *recorder.sections[plan.first : plan.last], *known.after))


@contextmanager
def _fake_world(world: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a trace is made outside of any process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _refuse_untraced(layout: Layout) -> None:
    if layout.offload != "none":
        raise UserError(f"offload:{layout.offload} moves real bytes and cannot be traced: try the layout without it")
    if layout.precision in NARROW:
        raise UserError(
            f"{layout.precision} products run on GPUs alone and cannot be traced: try bf16, which keeps the same tensors but for scales"
        )


def _data(layout: Layout, workload: Workload) -> list[Sequences]:
    shape = (layout.micro_batch, workload.seq)
    return [
        (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
        for _ in range(micro_batches(layout, workload))
    ]


def _classify_state(recorder: Recorder, engine: Engine, optimizer: Optimizer) -> None:
    """Moments are made by the first step; those that follow find them there, and they are what is traced."""
    for bucket in engine.state.buckets:
        weights, *moments = bucket.state_at_rest
        for held in (*moments, optimizer.counters[bucket], *(() if bucket.master is None else (weights,))):
            recorder.classify(held, "optimizer")
        recorder.classify(bucket.parameters, "parameters")
        recorder.classify(bucket.gradients, "gradients")
    take = engine.state.buffers.take

    def taken(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = take(numel, dtype, device)
        recorder.classify(buffer, "buffers")
        recorder.stays(buffer)
        return buffer

    engine.state.buffers.take = taken  # type: ignore[method-assign]


def _balance_experts(engine: Engine, layout: Layout, workload: Workload) -> None:
    tokens = layout.micro_batch * workload.seq // layout.cp // layout.tp
    for moe in engine.moes:
        experts = moe.router.experts
        if isinstance(moe.dispatch, ExpertParallelDispatch):
            rows = tokens * experts.top_k * layout.etp
            moe.dispatch.on_host = partial(_equal_counts, rows)  # type: ignore[method-assign]
        elif isinstance(moe.dispatch, LocalDispatch):
            rows = tokens * experts.top_k
            moe.dispatch.counted = lambda _, count, rows=rows: [*_shares(rows, count - 1), 0]  # type: ignore[method-assign]


def _equal_counts(rows: int, counts: Tensor) -> Any:
    """Of `rows` on each way, in the shape of `counts` [2, ranks, experts of each]."""
    _, ranks, held = counts.shape
    each = _shares(rows, ranks * held)
    return [[each[rank * held : (rank + 1) * held] for rank in range(ranks)]] * 2


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _stand_in_for_kernels(engine: Engine, recorder: Recorder) -> None:
    """Where values are narrower than keys, CPUs have no fused attention, and the engine widens the values; GPUs have one, and it is
    their memory that a trace is about."""
    for chunk in engine.chunks:
        for module in chunk.modules():
            if isinstance(module, AttentionCore):
                module.kernel = partial(narrow_attention, recorder)


def _remember_paths(weights: WeightGradients, paths: Paths) -> None:
    """Products that a schedule puts off belong to the module where they came up."""
    later = weights._now_or_later

    def now_or_later(product: Callable[[], None]) -> None:
        path = paths.here
        later(lambda: paths.resume(path, product))

    weights._now_or_later = now_or_later  # type: ignore[method-assign]
