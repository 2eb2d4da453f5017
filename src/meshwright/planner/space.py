"""The legal space of layouts of a model on so many ranks, as arrays.

A layout is put together from choices that hardly depend on one another:

    local      tp, sp, cp, ulysses, micro-batch    what a layer costs on a rank
    experts    ep, etp                             what its experts cost
    pipeline   pp, schedule, chunks                which layers a stage holds, and how it waits
    sharding   ZeRO stage and shard size           what the state costs
    order      of the ranks                        which groups share a scale-up domain
    relief     recompute, offload                  what gives way where memory is short

dp is what is left. A combination is legal when the equations of the layout hold and each choice is legal by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np

from meshwright.planner.arrays import Bools, Ints, distinct
from meshwright.planner.orders import ORDERS, OTHERS, Order, RankOrders, data_stride, strides
from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import (
    DENSE_AXES,
    OFFLOADS,
    RECOMPUTE_PARTS,
    Layout,
    Offload,
    Precision,
    Recompute,
    RecomputePart,
    ScheduleName,
)
from meshwright.spec.legality import check_layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

MAX_MICRO_BATCH = 16
"""Sequences. Larger ones only add memory: the GEMMs of 16 sequences of any length worth training on are large."""
MIN_TOKENS = 512
"""Tokens of a sequence on a cp rank: a ring of shorter pieces sends more than it computes."""
MAX_CHUNKS = 6
"""Chunks a stage of interleaved 1F1B: the bubble that is left after six is a sixth."""
LOCAL_ORDERS: tuple[Order, ...] = (
    ("dp", "tp", "cp", "pp"),
    ("cp", "dp", "tp", "pp"),
    ("tp", "dp", "cp", "pp"),
    DENSE_AXES,
)
"""In which neither tp nor cp shares a domain, in which cp does, in which tp does, in which both do."""
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
    order: Order = DENSE_AXES
    """Of the ranks, if there were no pipeline: it says whether tp and cp share a scale-up domain."""

    @property
    def tp_inside(self) -> bool:
        """Whether the ranks of tp do."""
        return LOCAL_ORDERS.index(self.order) in (2, 3)

    @property
    def cp_place(self) -> int:
        """Alike where the ranks of cp are the same distance apart: in the usual order that depends on tp."""
        return self.tp if self.order == DENSE_AXES else -(LOCAL_ORDERS.index(self.order) == 1)

    def tokens(self, seq: int) -> int:
        """Of a micro-batch on a rank."""
        return self.micro_batch * seq // self.cp

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
            precision=precision,
            order=self.order,
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
class Relief:
    """What a layout gives up of its speed for memory. How many layers of a chunk run again is left open."""

    recompute: Recompute = "none"
    parts: tuple[RecomputePart, ...] = ("core",)
    offload: Offload = "none"

    def includes(self, less: Relief) -> bool:
        """Whether all that `less` gives up this does too, in as many layers."""
        if OFFLOADS.index(less.offload) > OFFLOADS.index(self.offload):
            return False
        if "none" in (less.recompute, self.recompute):
            return less.recompute == "none"
        whole = set(self.parts) | ({"activation"} if "mlp" in self.parts else set())
        return self.recompute == "full" or (less.recompute == "selective" and set(less.parts) <= whole)


NONE = Relief()


@dataclass(frozen=True, slots=True)
class Columns:
    """Of each combination of a space."""

    tp: Ints
    sp: Bools
    cp: Ints
    ulysses: Ints
    micro_batch: Ints
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
    offloads: bool
    """Whether state can wait in the memory of the host."""
    locals: tuple[Local, ...]
    experts: tuple[tuple[int, int], ...]
    local: Ints
    expert: Ints
    pp: Ints
    dp: Ints
    order: Ints
    """Of the ranks: an index of `ORDERS`."""

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
        can = np.zeros(self.workload.global_batch + 1, dtype=bool)
        counts = np.flatnonzero(np.bincount(each))
        can[counts] = [_can_run(pipeline, m) for m in counts.tolist()]
        return can[each]

    @cached_property
    def columns(self) -> Columns:
        """The fields of the combinations, by their names in a layout."""
        names = ("tp", "sp", "cp", "ulysses", "micro_batch")
        local = {name: np.array([getattr(x, name) for x in self.locals])[self.local] for name in names}
        ep, etp = (np.array([pair[i] for pair in self.experts])[self.expert] for i in range(2))
        return Columns(**local, pp=self.pp, dp=self.dp, ep=ep, etp=etp)

    @cached_property
    def strides(self) -> dict[str, Ints]:
        """By axis, of each combination: ranks between neighbours."""
        return strides(self.order, self._degrees)

    @cached_property
    def data_stride(self) -> Ints:
        """Between ranks that hold the same weights of attention and dense layers, which are neighbours on dp and cp together."""
        return data_stride(self.strides, self._degrees)

    @cached_property
    def _degrees(self) -> dict[str, Ints]:
        return {axis: getattr(self.columns, axis) for axis in DENSE_AXES}

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

    @cached_property
    def reliefs(self) -> list[Relief]:
        """None, then every mode of recompute that is legal for the model, each with everything on the accelerator and with what can be
        offloaded."""
        modes = [NONE, Relief("full")]
        for count in range(1, len(RECOMPUTE_PARTS) + 1):
            modes += [Relief("selective", parts) for parts in combinations(RECOMPUTE_PARTS, count) if self._is_mode(parts)]
        offloads: tuple[Offload, ...] = ("none", "optimizer", "all") if self.offloads else ("none",)
        return [replace(mode, offload=offload) for offload in offloads for mode in modes]

    def _is_mode(self, parts: tuple[RecomputePart, ...]) -> bool:
        try:
            whole = Workload(self.workload.seq, 1)
            check_layout(Layout(recompute="selective", recompute_parts=parts), self.model, whole)
        except UserError:
            return False
        return True

    def can_relieve(self, relief: Relief, at: Ints, zero: Ints) -> Bools:
        """Which of `at`, with these ZeRO stages: a ring keeps no scores, and only parameters that come and go can be kept away."""
        legal = np.ones(len(at), dtype=bool)
        if relief.recompute == "selective" and "core" in relief.parts:
            legal &= self.columns.cp[at] == self.columns.ulysses[at]
        if relief.offload == "all":
            legal &= zero == 3
        return legal

    def most_layers(self, pipeline: Pipeline) -> int:
        """Of a chunk."""
        return -(-self.model.layers // (pipeline.pp * pipeline.chunks))

    def size(self) -> int:
        """Layouts, in every order of ranks."""
        if not len(self.local):
            return 0
        # What can be sharded, run, ordered and relieved depends on the local choice, on pp and on whether experts are cut.
        deepest, columns = int(self.pp.max()) + 1, self.columns
        keys = (self.local * deepest + self.pp) * 2 + (columns.ep * columns.etp > 1)
        counts = np.bincount(keys)
        first = np.zeros(len(counts), dtype=np.int64)
        first[keys] = np.arange(len(self.local))
        alike, times = first[counts > 0], counts[counts > 0]
        # With one kind of relief as many layers may run again as a chunk has.
        plain, again = (np.zeros(len(alike), dtype=np.int64) for _ in range(2))
        reliefs = {zero: self._count_reliefs(alike, zero) for zero in range(4)}
        for sharding in self.shardings:
            can = self.can_shard(sharding, alike)
            plain += can * reliefs[sharding.zero][0]
            again += can * reliefs[sharding.zero][1]
        layouts = np.zeros(len(alike), dtype=np.int64)
        for pp in distinct(self.pp).keys.tolist():
            its = np.flatnonzero(self.pp[alike] == pp)
            for pipeline in self.pipelines(pp):
                ways = plain[its] + again[its] * self.most_layers(pipeline)
                layouts[its] += self.runs(pipeline, alike[its]) * ways
        orders = self.orders(alike)
        return int((layouts * times * (1 + np.sum([orders.can(order) for order in OTHERS], axis=0))).sum())

    def _count_reliefs(self, at: Ints, zero: int) -> tuple[Ints, Ints]:
        """Of each of `at` under a ZeRO stage: reliefs that run nothing again, and those that do."""
        out = np.zeros(len(at), dtype=np.int64), np.zeros(len(at), dtype=np.int64)
        for relief in self.reliefs:
            out[relief.recompute != "none"][:] += self.can_relieve(relief, at, np.full(len(at), zero))
        return out

    def orders(self, at: Ints) -> RankOrders:
        """Of the combinations `at`."""
        degrees = {axis: each[at] for axis, each in self._degrees.items()}
        return RankOrders(degrees, self.columns.ep[at] * self.columns.etp[at] > 1, self.domain)

    def ordered(self, at: Ints, order: Ints) -> Space:
        """The combinations `at`, each with its ranks in another order, which is legal for it; local choices and experts that none of them
        has are left out."""
        degrees = {axis: each[at] for axis, each in self._degrees.items()}
        spans = {axis: strides(order, degrees)[axis] * degrees[axis] for axis in ("tp", "cp")}
        tp_inside, cp_inside = ((degrees[axis] == 1) | (span <= self.domain) for axis, span in spans.items())
        used, _, local = distinct(self.local[at] * 4 + 2 * tp_inside + cp_inside)
        locals_ = tuple(replace(self.locals[key // 4], order=LOCAL_ORDERS[key % 4]) for key in used.tolist())
        cuts, _, expert = distinct(self.expert[at])
        experts = tuple(self.experts[cut] for cut in cuts.tolist())
        return replace(
            self, locals=locals_, experts=experts, local=local, expert=expert, pp=self.pp[at], dp=self.dp[at], order=order
        )

    def layout(
        self, at: int, pipeline: Pipeline, sharding: Sharding, relief: Relief = NONE, layers: int | None = None
    ) -> Layout:
        """`layers`: of each chunk, which run again; None: all."""
        local, (ep, etp) = self.locals[self.local[at]], self.experts[self.expert[at]]
        all_ = relief.recompute == "none" or layers is None or layers >= self.most_layers(pipeline)
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
            recompute=relief.recompute,
            recompute_parts=relief.parts,
            recompute_layers=None if all_ else layers,
            precision=self.precision,
            offload=relief.offload,
            order=ORDERS[self.order[at]],
        )


def space_on(cluster: Cluster, model: Model, workload: Workload, gpus: int, precision: Precision) -> Space:
    """The legal space on accelerators of `cluster`."""
    offloads = cluster.accelerator.host_bandwidth is not None
    return legal_space(model, workload, gpus, precision, cluster.fabric.domain, offloads)


def legal_space(
    model: Model, workload: Workload, gpus: int, precision: Precision, domain: int = 8, offloads: bool = False
) -> Space:
    """All of it; arrays are empty where nothing is legal. `domain`: ranks of a scale-up domain; `offloads`: whether it is known how
    fast state comes and goes."""
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
    usual = np.zeros(len(local), dtype=np.int64)
    return Space(
        model, workload, gpus, precision, domain, offloads, locals_, experts, local, expert, stages[pp], dp[local, pp], usual
    )  # fmt: skip


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
                local = Local(tp, sp, cp, ulysses, micro_batch)
                if _is_legal(local.layout(gpus, precision), model, workload):
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
