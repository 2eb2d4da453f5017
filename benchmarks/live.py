"""Bytes that ranks hold at the fullest moment of a step, counted in real runs on this machine, beside a dry run and the estimate.

    python benchmarks/live.py

Small models on gloo ranks. Every storage counts from the operator that makes it until its last reference goes, in a step after the first,
whose moments are new. gloo's threads let go of a collective's tensors a little late: they are given the time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory import DENSE, LAYER_NORM, SPARSE, WORKLOAD
from memory_ranks import batches, train_step
from meshwright.models.init import initial_value
from meshwright.parallel import collectives, pipeline
from meshwright.parallel.apply import apply
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.ranks import RankPool
from meshwright.schedule.stages import first_rank
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.workload import Workload
from meshwright.trace.check import check_stage
from meshwright.trace.engine import trace_ranks
from meshwright.train.optimizer import Optimizer
from meshwright.train.recipe import Recipe

STEPS = 2
"""Of which the first is not counted."""
SETTLED = 0.005
"""Seconds without a change."""

CASES: tuple[tuple[Model, str], ...] = (
    (DENSE, "mb2 fp32"),
    (DENSE, "mb8 bf16"),
    (DENSE, "mb2 ac:full bf16"),
    (LAYER_NORM, "mb4 ac:core+norms+mlp fp32"),
    (DENSE, "dp2:zero3 mb2 fp32"),
    (DENSE, "tp2:sp mb4 bf16"),
    (DENSE, "cp2:ring mb4 fp32"),
    (DENSE, "pp2:zb-h1 mb1 fp32"),
    (SPARSE, "dp2 ep2 mb4 bf16"),
    (DENSE, "dp4:zero2 mb1 bf16"),
    (DENSE, "dp2:zero1 tp2:sp mb2 bf16 params:fp32"),
    (DENSE, "pp4:1f1b mb1 bf16"),
    (DENSE, "pp2x2:interleaved tp2 mb1 ac:full bf16"),
    (DENSE, "dp8:zero3 mb1 bf16"),
    (DENSE, "dp2:zero1 tp2:sp pp2:1f1b mb1 bf16"),
    (DENSE, "cp2:ulysses tp2:async pp2x2:dualpipe-v mb1 bf16"),
    (SPARSE, "dp4:zero1 tp2:sp ep8 mb2 bf16"),
)


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of the storages that operators have made inside it and that live; `most`: the most since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = weakref.ref(
                        storage, partial(self._went, storage._cdata, storage.nbytes())
                    )
                    self.now += storage.nbytes()
        if self.now > self.most:
            self._settle()
            self.most = max(self.most, self.now)
        return out

    def _settle(self) -> None:
        """Before a new maximum is believed, what gloo's threads still hold of collectives that are over has time to go."""
        before = -1
        while self.most < self.now != before:
            before = self.now
            time.sleep(SETTLED)

    def _went(self, key: int, nbytes: int, _: Any) -> None:
        del self._known[key]
        self.now -= nbytes


def _reduce_scatter(out: Tensor, tensor: Tensor, *, group: Any, async_op: bool) -> Any:
    return collectives._native_reduce_scatter(out, tensor, group=group, async_op=async_op)


def peak(model: Model, workload: Workload, layout: Layout) -> int:
    """Of this rank. gloo says that a send is through only when it is asked to wait: each is, when its stage next communicates. What the
    engine makes a reduce-scatter of on gloo, an all-to-all and a sum, needs room for the pieces, which others do not: here it is gloo's."""
    pipeline.MOST_LEAVING = 0
    collectives._reduce_scatter = _reduce_scatter
    mesh = build_mesh(layout, model, torch.device("cpu"))
    with LiveBytes() as live:
        engine = apply(
            model, workload, mesh, lambda shard: shard.of(initial_value(model, shard.name, shard.global_shape, 0))
        )
        optimizer, peaks = Optimizer(Recipe(), engine.state), []
        for step in range(STEPS):
            live.most = live.now
            train_step(engine, optimizer, step, batches(mesh, model, workload, step))
            peaks.append(live.most)
    return min(peaks[1:])


def measured(pool: RankPool, cases: Sequence[tuple[Model, str]]) -> Iterator[tuple[Model, str, int, int, int]]:
    """Model, layout, and bytes of the first rank of the stage that holds most: counted, traced, estimated. With experts what is counted is
    the mean over the stage, because routers send what they like."""
    for model, text in cases:
        layout = parse_layout(text)
        counted = pool.run(peak, layout.world, model, WORKLOAD, layout, timeout=600.0)
        traced = trace_ranks(model, layout, WORKLOAD, [first_rank(layout, stage) for stage in range(layout.pp)])
        one = max(traced, key=lambda traced: traced.peak_bytes)
        its = [n for rank, n in enumerate(counted) if Grid(layout).coordinates(rank)["pp"] == one.stage]
        seen = round(sum(its) / len(its)) if model.experts else counted[one.rank]
        yield model, text, seen, one.peak_bytes, check_stage(one, model, layout, WORKLOAD).estimated_peak_bytes


def table(cases: Sequence[tuple[Model, str]]) -> Iterator[str]:
    yield "| ranks | model | layout | counted | traced | | estimated | |"
    yield "|---|---|---|---|---|---|---|---|"
    pool = RankPool()
    try:
        for model, text, counted, traced, estimated in measured(pool, cases):
            figures = (
                f"{counted:,} | {traced:,} | {traced / counted - 1:+.2%} | {estimated:,} | {estimated / counted - 1:+.2%}"
            )
            yield f"| {parse_layout(text).world} | {model.name} | `{text}` | {figures} |"
    finally:
        pool.close()


if __name__ == "__main__":
    for line in table(CASES):
        print(line, flush=True)
