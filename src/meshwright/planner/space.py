"""The legal space of layouts of a model on so many ranks, as arrays.

A layout is put together from four choices that hardly depend on one another:

    local      tp, sp, cp, ulysses, micro-batch, recompute     what a layer costs on a rank
    experts    ep, etp                                         what its experts cost
    pipeline   pp, schedule, chunks                            which layers a stage holds, and how it waits
    sharding   ZeRO stage and shard size                       what the state costs

dp is what is left. A combination is legal when the equations of the layout hold and each choice is legal by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision, Recompute, ScheduleName
from meshwright.spec.legality import check_layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MAX_MICRO_BATCH = 16
"""Sequences. Larger ones only add memory: the GEMMs of 16 sequences of any length worth training on are large."""
MIN_TOKENS = 512
"""Tokens of a sequence on a cp rank: a ring of shorter pieces sends more than it computes."""
MAX_CHUNKS = 6
"""Chunks a stage of interleaved 1F1B: the bubble that is left after six is a sixth."""
MAX_ETP = 8
"""Ranks that share an expert: experts are narrow, and their products get narrower."""


@dataclass(frozen=True, slots=True)
class Local:
    """What decides the work of a layer without experts."""

    tp: int
    sp: bool
    cp: int
    ulysses: int
    micro_batch: int
    recompute: Recompute

    def layout(self, gpus: int, precision: Precision, ep: int = 1, etp: int = 1) -> Layout:
        """With this work, on all of `gpus` ranks."""
        return Layout(
            dp=gpus // (self.tp * self.cp),
            tp=self.tp,
            sp=self.sp,
            cp=self.cp,
            cp_ulysses=self.ulysses,
            ep=ep,
            etp=etp,
            micro_batch=self.micro_batch,
            recompute=self.recompute,
            precision=precision,
        )


@dataclass(frozen=True, slots=True)
class Pipeline:
    pp: int
    schedule: ScheduleName
    chunks: int


@dataclass(frozen=True, slots=True)
class Sharding:
    zero: int
    shard: int | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Of each combination of a space."""

    tp: Ints
    sp: Bools
    cp: Ints
    ulysses: Ints
    micro_batch: Ints
    recompute: NDArray[np.str_]
    pp: Ints
    dp: Ints
    ep: Ints
    etp: Ints


@dataclass(frozen=True)
class Space:
    """Every combination of local, experts and pp that fills `gpus` ranks and divides the batch; arrays of one entry each."""

    model: Model
    workload: Workload
    gpus: int
    precision: Precision
    domain: int
    """Ranks of one scale-up domain: hybrid sharding is offered over these."""
    locals: tuple[Local, ...]
    experts: tuple[tuple[int, int], ...]
    local: Ints
    expert: Ints
    pp: Ints
    dp: Ints

    @cached_property
    def micro_batches(self) -> Ints:
        return self.workload.global_batch // (self.dp * self.columns.micro_batch)

    def pipelines(self, pp: int) -> list[Pipeline]:
        """The schedules that `pp` stages of the model can run. GPipe is left out: its bubble is that of 1F1B and its memory never
        less."""
        if pp == 1:
            return [Pipeline(1, "1f1b", 1)]
        out = [Pipeline(pp, "1f1b", 1), Pipeline(pp, "zb-h1", 1)]
        if 2 * pp <= self.model.layers:
            out += [Pipeline(pp, "zb-v", 2), Pipeline(pp, "dualpipe-v", 2)]
        most = self.model.layers // pp
        return out + [Pipeline(pp, "interleaved", chunks) for chunks in range(2, min(most, MAX_CHUNKS) + 1)]

    def runs(self, pipeline: Pipeline, at: Ints) -> Bools:
        """Which of the combinations `at` have micro-batches that the schedule can run."""
        each = self.micro_batches[at]
        counts, which = np.unique(each, return_inverse=True)
        return np.array([_can_run(pipeline, int(m)) for m in counts], dtype=bool)[which]

    @cached_property
    def columns(self) -> Columns:
        """The fields of the combinations, by their names in a layout."""
        local = {name: np.array([getattr(x, name) for x in self.locals])[self.local] for name in Local.__slots__}
        ep, etp = (np.array([pair[i] for pair in self.experts])[self.expert] for i in range(2))
        return Columns(**local, pp=self.pp, dp=self.dp, ep=ep, etp=etp)

    @cached_property
    def shardings(self) -> list[Sharding]:
        """ZeRO over all data-parallel ranks, or over those that share a scale-up domain."""
        hybrid = [Sharding(zero, g) for zero in (1, 2, 3) for g in divisors(self.domain) if g > 1]
        return [Sharding(0), *(Sharding(zero) for zero in (1, 2, 3)), *hybrid]

    def can_shard(self, sharding: Sharding, at: Ints) -> Bools:
        """Which of `at` can be sharded so: over ranks that there are, and, in groups, over fewer than all of a domain's."""
        dp, cp = self.dp[at], self.columns.cp[at]
        if sharding.zero == 0:
            return np.ones(len(at), dtype=bool)
        if sharding.shard is None:
            return np.asarray(dp * cp > 1)
        fills = sharding.shard * self.columns.tp[at] * cp == self.domain
        return np.asarray(fills & (dp % sharding.shard == 0) & (dp > sharding.shard))

    def size(self) -> int:
        """Layouts."""
        # What can be sharded and run depends on the local choice and pp alone, whatever cuts experts.
        if not len(self.local):
            return 0
        deepest = int(self.pp.max()) + 1
        counts = np.bincount(self.local * deepest + self.pp)
        first = np.zeros(len(counts), dtype=np.int64)
        first[self.local * deepest + self.pp] = np.arange(len(self.local))
        alike, times = first[counts > 0], counts[counts > 0]
        shardings = np.sum([self.can_shard(sharding, alike) for sharding in self.shardings], axis=0)
        pipelines = np.zeros(len(alike), dtype=np.int64)
        for pp in np.unique(self.pp).tolist():
            its = np.flatnonzero(self.pp[alike] == pp)
            pipelines[its] = np.sum([self.runs(pipeline, alike[its]) for pipeline in self.pipelines(pp)], axis=0)
        return int((pipelines * shardings * times).sum())

    def layout(self, at: int, pipeline: Pipeline, sharding: Sharding) -> Layout:
        local, (ep, etp) = self.locals[self.local[at]], self.experts[self.expert[at]]
        return Layout(
            dp=int(self.dp[at]),
            tp=local.tp,
            pp=pipeline.pp,
            cp=local.cp,
            ep=ep,
            etp=etp,
            sp=local.sp,
            zero=sharding.zero,
            zero_shard=sharding.shard,
            chunks=pipeline.chunks,
            schedule=pipeline.schedule,
            cp_ulysses=local.ulysses,
            micro_batch=local.micro_batch,
            recompute=local.recompute,
            precision=self.precision,
        )


def legal_space(model: Model, workload: Workload, gpus: int, precision: Precision, domain: int = 8) -> Space:
    """All of it; arrays are empty where nothing is legal. `domain`: ranks of a scale-up domain."""
    locals_ = tuple(_locals(model, workload, gpus, precision))
    experts = tuple(_experts(model, gpus))
    stages = np.array([pp for pp in divisors(gpus) if pp <= model.layers], dtype=np.int64)
    ranks = np.array([x.tp * x.cp for x in locals_], dtype=np.int64)
    size = np.array([x.micro_batch for x in locals_], dtype=np.int64)
    folded = np.array([ep * etp for ep, etp in experts], dtype=np.int64)
    inner = ranks[:, None] * stages
    dp = gpus // inner
    fills = (gpus % inner == 0) & (dp > 0) & (workload.global_batch % np.maximum(1, dp * size[:, None]) == 0)
    folds = (gpus // stages) % folded[:, None] == 0
    local, expert, pp = np.nonzero(fills[:, None] & folds)
    return Space(model, workload, gpus, precision, domain, locals_, experts, local, expert, stages[pp], dp[local, pp])


@lru_cache(maxsize=1024)
def divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _locals(model: Model, workload: Workload, gpus: int, precision: Precision) -> Iterator[Local]:
    for tp in divisors(gpus):
        if model.heads % tp == 0:  # the first thing that `check_layout` asks, here so that it is asked once
            for cp in divisors(gpus // tp):
                if cp > 1 and workload.seq // cp < MIN_TOKENS:
                    break
                yield from _locals_of(tp, cp, model, workload, gpus, precision)


def _locals_of(tp: int, cp: int, model: Model, workload: Workload, gpus: int, precision: Precision) -> Iterator[Local]:
    for ulysses in divisors(cp):
        for micro_batch in divisors(workload.global_batch):
            if micro_batch > MAX_MICRO_BATCH:
                break
            for sp in (True, False) if tp > 1 else (False,):
                for recompute in ("none", "full") if cp > ulysses else ("none", "selective", "full"):
                    local = Local(tp, sp, cp, ulysses, micro_batch, recompute)
                    if not _is_legal(local.layout(gpus, precision), model, workload):
                        break  # for the same reason whatever is recomputed
                    yield local


def _is_legal(layout: Layout, model: Model, workload: Workload) -> bool:
    try:
        check_layout(layout, model, Workload(workload.seq, layout.dp * layout.micro_batch))
    except UserError:
        return False
    return True


def _experts(model: Model, gpus: int) -> Iterator[tuple[int, int]]:
    if model.experts is None:
        yield 1, 1
        return
    for ep in divisors(model.experts.count):
        for etp in divisors(MAX_ETP):
            if gpus % (ep * etp) == 0 and model.experts.ffn % etp == 0:
                yield ep, etp


def _can_run(pipeline: Pipeline, micro_batches: int) -> bool:
    try:
        check_micro_batches(pipeline.schedule, pipeline.pp, micro_batches)
    except UserError:
        return False
    return True
