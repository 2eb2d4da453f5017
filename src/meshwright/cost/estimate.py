"""Prices one layout: memory, traffic, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from meshwright.cost.adapt import as_practised, is_recomputed, with_gradients_of
from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.flops import model_flops_per_token, recomputed_flops_per_token
from meshwright.cost.kernels import Kernels
from meshwright.cost.memory import StageMemory, passing_bytes, stage_memory, state_bytes
from meshwright.cost.ops import PART, Attention, Collective, Elementwise, Gemm, Op, Piece, Under
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.program import Pieces, Place, Program, boundary, chunk_pieces, rank_program
from meshwright.cost.timeline import ChunkSeconds, Timeline, play, play_end
from meshwright.cost.traffic import step_collectives
from meshwright.schedule.orders import layout_order, wound_order
from meshwright.schedule.stages import alike_stages
from meshwright.spec.cluster import Cluster
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.kernels import KernelConstants, load_kernel_constants
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout, check_room, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """All calls of one operation on one axis in a step, on the stage that sends most of it."""

    axis: str
    op: str
    group_size: int
    stage: int
    link: str
    count: int
    bytes: int
    time_s: float
    exposed_s: float
    """The part that nothing hides."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a layout costs. Sizes in bytes, times in seconds, rates per second."""

    layout: Layout
    model: str
    cluster: str
    workload: Workload
    step_time_s: float
    mfu: float
    hfu: float
    bubble: float
    fits: bool
    memory: tuple[StageMemory, ...]
    memory_limit_bytes: int
    collectives: tuple[CollectiveCost, ...]
    breakdown: dict[str, float]
    """Seconds of the step by what the busiest stage spends them on."""
    evidence: dict[str, str]
    timeline: Timeline | None = field(default=None, repr=False)

    @property
    def tokens_per_s(self) -> float:
        return self.workload.tokens / self.step_time_s

    @property
    def peak_bytes(self) -> int:
        return max(stage.total_bytes for stage in self.memory)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "layout": str(self.layout),
            "world": self.layout.world,
            "model": self.model,
            "cluster": self.cluster,
            "seq": self.workload.seq,
            "global_batch": self.workload.global_batch,
            "micro_batches": micro_batches(self.layout, self.workload),
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.layout.world,
            "tokens_per_day": self.tokens_per_s * 86_400,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "bubble": self.bubble,
            "fits": self.fits,
            "memory_limit_bytes": self.memory_limit_bytes,
            "memory": [{"stage": s.stage, "total_bytes": s.total_bytes, "categories": s.categories} for s in self.memory],
            "collectives": [{name: getattr(c, name) for name in CollectiveCost.__slots__} for c in self.collectives],
            "breakdown": self.breakdown,
            "evidence": self.evidence,
        }


@dataclass(frozen=True, slots=True)
class Price:
    """Of a layout, without its tables."""

    step_time_s: float
    peak_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of one micro-batch on a stage."""

    forward: float
    backward: float
    compute: float
    """Forward and backward without communication."""
    weight: float
    """The part of the backward that a zero-bubble schedule can put off: the products that make weight gradients."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the parameters of a stage cost a rank."""

    reductions: tuple[float, ...]
    """Seconds of each bucket's gradient reduction."""
    rest: float
    """Seconds of the step's other collectives and of the optimizer."""
    sharding: tuple[float, float]
    """Seconds of ZeRO's communication in each forward and backward."""
    bytes: int


_STATE_FIELDS = tuple(f.name for f in fields(Layout) if f.name not in ("micro_batch", "recompute"))


class Estimator:
    """Prices layouts of one model, cluster and workload; remembers what layouts share."""

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        workload: Workload,
        practice: Practice = OWN,
        constants: KernelConstants | None = None,
    ):
        self.model, self.cluster, self.workload, self.practice = model, cluster, workload, practice
        self.constants = constants or load_kernel_constants()
        self.times = CollectiveTimes(cluster, load_collective_constants(), practice.single_ring)
        self.flops = model_flops_per_token(model, workload.seq)
        self.recomputed_flops = recomputed_flops_per_token(model, workload.seq)
        given = cluster.accelerator.overhead_bytes
        self.overhead = self.constants.overhead_bytes if given is None else given
        self._seconds: dict[tuple[int, bool], tuple[Piece, Durations]] = {}
        self._adapted: dict[tuple[object, ...], tuple[Piece, Piece]] = {}
        self._states: dict[tuple[object, ...], _State] = {}

    def estimate(self, layout: Layout) -> Estimate:
        """Price `layout` by playing its schedule. Raises UserError for a layout that cannot be run."""
        self.check(layout)
        m = micro_batches(layout, self.workload)
        schedule, wound = layout_order(layout, m), wound_order(layout.schedule, layout.pp, m, layout.chunks)
        kinds = [(members[0], len(members)) for members in alike_stages(self.model, layout)]
        programs = self._programs(layout)
        memory = tuple(stage_memory(p, layout, schedule, stage, self.overhead) for stage, p in enumerate(programs))
        send = self.send_seconds(layout)
        alone = [self._passing(self.durations(p.pieces, layout, shared=False), *self._sharding(p)) for p in programs]
        floor = self._shared_floor(layout, [(programs[stage].pieces, count) for stage, count in kinds])
        timeline = play(schedule, [self._chunk_seconds(p, layout) for p in programs], send, wound)
        end = max(self._step_end(p, layout, d) for p, d in zip(programs, alone, strict=True))
        step = max(timeline.end, floor) + end
        # Between fill and drain a send runs beside computation; filling and draining wait for one hop a stage each.
        costs = self._collective_costs(programs, layout, alone, exposed_sends=2 * (layout.pp - 1) * send)
        compute = max(d.compute for d in alone) * schedule.micro_batches
        kernels = self.kernels(layout, shared=True)
        optimizer = max(kernels.elementwise(p.optimizer) for p in programs)
        return self._result(layout, step, timeline, memory, costs, {"compute": compute, "optimizer": optimizer})

    def played(self, layout: Layout) -> Price:
        """Step time and peak as in `estimate`, without its tables: for pricing many layouts."""
        m = micro_batches(layout, self.workload)
        schedule = layout_order(layout, m)
        turns = wound_order(layout.schedule, layout.pp, m, layout.chunks)
        seconds: list[list[ChunkSeconds]] = [[] for _ in range(layout.pp)]
        end = peak = floor = 0.0
        for members in alike_stages(self.model, layout):
            state = self._state(layout, members[0])
            its = chunk_pieces(self.model, layout, self.workload.seq, Place(members[0]))
            chunks = tuple(self._practised(chunk, layout) for chunk in its)
            pieces = tuple(piece for chunk in chunks for piece in chunk)
            each = [
                self._passing(self.durations(c, layout, shared=False), *(s / len(chunks) for s in state.sharding))
                for c in chunks
            ]
            whole = self._passing(self.durations(pieces, layout, shared=False), *state.sharding)
            end = max(end, self._exposed_reduction(state.reductions, whole) + state.rest)
            saved = [sum(piece.saved_bytes * repeat for piece, repeat in chunk) for chunk in chunks]
            for stage in members:
                seconds[stage] = [ChunkSeconds(d.forward, d.backward, d.weight) for d in each]
                sent = sum(c.bytes for c in boundary(self.model, layout, self.workload.seq, stage))
                passing = passing_bytes(pieces, schedule.peak(stage, saved), sent)
                peak = max(peak, state.bytes + sum(passing.values()) + self.overhead)
            if self.cluster.node.compute_slots is not None:
                busy = self.durations(pieces, layout, shared=True)
                floor += (busy.forward + busy.backward) * len(members) * m / layout.pp
        step = max(play_end(turns, seconds, self.send_seconds(layout)), floor if layout.world > 1 else 0.0) + end
        return Price(step, int(peak), peak <= self.cluster.accelerator.memory_bytes)

    def _state(self, layout: Layout, stage: int) -> _State:
        """What a stage's parameters cost, whatever the micro-batch: layouts that share it plan their buckets once."""
        key = (*(getattr(layout, name) for name in _STATE_FIELDS), stage)
        if key not in self._states:
            program = with_gradients_of(
                rank_program(self.model, layout, self.workload, Place(stage)), layout, self.practice.gradient_bytes
            )
            self._states[key] = _State(
                tuple(self.times.seconds(c) for c in program.gradient_reductions),
                self._rest(program, layout),
                self._sharding(program),
                self._state_bytes(program, layout),
            )
        return self._states[key]

    def _state_bytes(self, program: Program, layout: Layout) -> int:
        held = state_bytes(program, layout, self.practice.gradient_bytes)
        return held["parameters"] if self.practice.frozen else sum(held.values())

    def _programs(self, layout: Layout) -> list[Program]:
        """Each stage's program; stages that hold the same share one."""
        out: dict[int, Program] = {}
        for members in alike_stages(self.model, layout):
            program = rank_program(self.model, layout, self.workload, Place(members[0]))
            program = with_gradients_of(program, layout, self.practice.gradient_bytes)
            program = replace(program, chunks=tuple(self._practised(chunk, layout) for chunk in program.chunks))
            out |= dict.fromkeys(members, program)
        return [out[stage] for stage in range(layout.pp)]

    def _practised(self, pieces: Pieces, layout: Layout) -> Pieces:
        if self.practice == OWN:
            return pieces
        tokens = layout.micro_batch * self.workload.seq // layout.cp
        out = []
        for piece, repeat in pieces:
            key = (id(piece), layout.tp, layout.sp, layout.recompute)
            if key not in self._adapted:
                self._adapted[key] = piece, as_practised(piece, self.practice, self.model, layout, tokens)
            out.append((self._adapted[key][1], repeat))
        return tuple(out)

    def check(self, layout: Layout) -> None:
        """Raise UserError when the layout cannot run this model and workload, or is not built yet."""
        refuse_unbuilt(layout)
        check_layout(layout, self.model, self.workload)
        check_room(layout, self.cluster)
        _ = self.kernels(layout, shared=False).peak_flops

    def durations(self, pieces: Pieces, layout: Layout, *, shared: bool) -> Durations:
        """One micro-batch through `pieces`; `shared` when all ranks of a node compute at once."""
        kernels = self.kernels(layout, shared=shared)
        each = [(self._piece_durations(piece, kernels, shared), repeat) for piece, repeat in pieces]
        return Durations(*(sum(getattr(d, name) * repeat for d, repeat in each) for name in Durations.__slots__))

    def _sharding(self, program: Program) -> tuple[float, float]:
        """Seconds of the parameter gathers and gradient reductions that ZeRO-2 and 3 do in each forward and backward."""
        forward, backward = (sum(self.times.seconds(c) for c in gathers) for gathers in program.gathers)
        return forward, backward + sum(self.times.seconds(c) for c in program.scatters)

    def _passing(self, d: Durations, forward: float, backward: float) -> Durations:
        """`d` with communication of each pass that runs under its computation: what does not fit is exposed."""
        if not forward and not backward:
            return d
        if self.times.hides:
            forward, backward = self._beside(forward, d.forward), self._beside(backward, d.backward)
        return Durations(d.forward + forward, d.backward + backward, d.compute, d.weight)

    def _chunk_seconds(self, program: Program, layout: Layout) -> list[ChunkSeconds]:
        """Of each chunk of a stage; what ZeRO sends is shared out evenly."""
        sharding = [seconds / len(program.chunks) for seconds in self._sharding(program)]
        each = [self._passing(self.durations(pieces, layout, shared=False), *sharding) for pieces in program.chunks]
        return [ChunkSeconds(d.forward, d.backward, d.weight) for d in each]

    def send_seconds(self, layout: Layout) -> float:
        sends = boundary(self.model, layout, self.workload.seq, 0)
        return self.times.seconds(sends[0]) if sends else 0.0

    def _shared_floor(self, layout: Layout, stages: list[tuple[Pieces, int]]) -> float:
        """Where ranks share cores, the step cannot be shorter than all the work at the rate that all of them together reach."""
        if self.cluster.node.compute_slots is None or layout.world == 1:
            return 0.0
        busy = [(self.durations(pieces, layout, shared=True), count) for pieces, count in stages]
        return micro_batches(layout, self.workload) * sum((d.forward + d.backward) * count for d, count in busy) / layout.pp

    def kernels(self, layout: Layout, *, shared: bool) -> Kernels:
        active = min(layout.world, self.cluster.node.accelerators) if shared else 1
        return Kernels(self.cluster, layout.precision, active, self.practice, self.constants)

    def _piece_durations(self, piece: Piece, kernels: Kernels, shared: bool) -> Durations:
        key = (id(piece), shared)
        if key not in self._seconds:
            host = [self._host_seconds(piece, ops, kernels) for ops in (piece.forward, piece.backward)]
            forward, backward = self._run(piece.forward, kernels, host[0]), self._run(piece.backward, kernels, host[1])
            # The piece is kept beside its price, so that its id is not used again.
            self._seconds[key] = (
                piece,
                Durations(
                    forward[0] + forward[1],
                    backward[0] + backward[1],
                    forward[0] + backward[0],
                    self._weight_seconds(piece.backward, kernels),
                ),
            )
        return self._seconds[key][1]

    def _host_seconds(self, piece: Piece, ops: tuple[Op, ...], kernels: Kernels) -> float:
        # Bounds add up parts of a layer: what one part waits for the host, another may compute.
        return 0.0 if piece.name == PART else kernels.host_seconds(ops, is_recomputed(piece))

    def _run(self, ops: tuple[Op, ...], kernels: Kernels, host: float) -> tuple[float, float]:
        """(seconds of computation, seconds of exposed communication) of `ops` in order. `host`: seconds of starting them.

        The host launches kernels while earlier ones run: where all of them take less than the launches, those are what lasts.
        """
        compute = exposed = 0.0
        for op in ops:
            if isinstance(op, Gemm):
                compute += kernels.gemm(op)
            elif isinstance(op, Attention):
                compute += kernels.attention(op)
            elif isinstance(op, Elementwise):
                compute += kernels.elementwise(op)
            elif isinstance(op, Collective):
                exposed += self._exposed_in_line(op)
            else:
                work = self._work(op, kernels)
                compute += work
                exposed += self._exposed(op, work)
        return max(compute, host - exposed), exposed

    def _exposed_in_line(self, op: Collective) -> float:
        """Seconds of a collective between two products, of which all but a part can run in pieces beside them."""
        seconds = self.times.seconds(op)
        if not self.practice.overlaps_tensor or op.axis != "tp":
            return seconds
        return seconds / op.group_size + self.constants.beside * seconds * (1 - 1 / op.group_size)

    def _weight_seconds(self, ops: tuple[Op, ...], kernels: Kernels) -> float:
        products = [g for op in ops for g in (op.work if isinstance(op, Under) else (op,)) if isinstance(g, Gemm)]
        return sum(kernels.gemm(g) for g in products if g.is_weight_gradient)

    def _work(self, op: Under, kernels: Kernels) -> float:
        return sum(kernels.gemm(g) if isinstance(g, Gemm) else kernels.attention(g) for g in op.work)

    def _exposed(self, op: Under, work: float) -> float:
        seconds = self.times.seconds(op.collective)
        hides = self.times.hides and (self.practice.overlaps_dx or op.collective.op != "all_reduce")
        return self._beside(seconds, work) if hides else seconds

    def _beside(self, seconds: float, work: float) -> float:
        """What communication of `seconds` adds to computation of `work` seconds that it runs beside: the part that does not fit,
        and what the rest takes from the computation (processors and memory bandwidth)."""
        return max(0.0, seconds - work) + self.constants.beside * min(seconds, work)

    def _step_end(self, program: Program, layout: Layout, d: Durations) -> float:
        """After the last backward: what is left of the gradient reduction, the step's other collectives, the optimizer."""
        reductions = tuple(self.times.seconds(c) for c in program.gradient_reductions)
        return self._exposed_reduction(reductions, d) + self._rest(program, layout)

    def _rest(self, program: Program, layout: Layout) -> float:
        """The step's other collectives, and the optimizer."""
        if self.practice.frozen:
            return 0.0
        hidden = ("all_gather",) if self.practice.overlaps_gathers and self.times.hides else ()
        sent = sum(self.times.seconds(c) for c in program.step_end if c.op not in hidden)
        return sent + self.kernels(layout, shared=True).elementwise(program.optimizer)

    def _exposed_reduction(self, reductions: Sequence[float], d: Durations) -> float:
        """All but the last bucket can run under the last micro-batch's backward."""
        if self.practice.frozen:
            return 0.0
        if not reductions or not self.times.hides or not self.practice.overlaps_gradients:
            return sum(reductions)
        return max(reductions[-1], self._beside(sum(reductions), d.backward))

    def _collective_costs(
        self, programs: list[Program], layout: Layout, alone: list[Durations], exposed_sends: float
    ) -> tuple[CollectiveCost, ...]:
        m = micro_batches(layout, self.workload)
        best: dict[tuple[str, str, int], CollectiveCost] = {}
        for stage, (program, d) in enumerate(zip(programs, alone, strict=True)):
            hidden = self._hidden_by_kind(program, layout, d, m)
            rows: dict[tuple[str, str, int], list[tuple[Collective, int]]] = {}
            for c, times in step_collectives(program, m):
                rows.setdefault((c.axis, c.op, c.group_size), []).append((c, times))
            for key, calls in rows.items():
                seconds = sum(self.times.seconds(c) * times for c, times in calls)
                exposed = exposed_sends if key[:2] == ("pp", "send") else max(0.0, seconds - hidden.get(key, 0.0))
                nbytes = sum(c.bytes * times for c, times in calls)
                if key not in best or nbytes > best[key].bytes:
                    link = self.times.link(calls[0][0])
                    best[key] = CollectiveCost(*key, stage, link, sum(t for _, t in calls), nbytes, seconds, exposed)
        return tuple(best[key] for key in sorted(best))

    def _hidden_by_kind(self, program: Program, layout: Layout, d: Durations, m: int) -> dict[tuple[str, str, int], float]:
        """Seconds of communication that run under computation, by (axis, op, group size)."""
        kernels = self.kernels(layout, shared=False)
        hidden: dict[tuple[str, str, int], float] = {}
        for piece, repeat in program.pieces:
            for op in (*piece.forward, *piece.backward):
                if isinstance(op, Under):
                    c = op.collective
                    gained = self.times.seconds(c) - self._exposed(op, self._work(op, kernels))
                    key = (c.axis, c.op, c.group_size)
                    hidden[key] = hidden.get(key, 0.0) + gained * repeat * m
        bare = self.durations(program.pieces, layout, shared=False)
        for calls, work in ((program.gathers[0], bare.forward), ((*program.gathers[1], *program.scatters), bare.backward)):
            together = sum(self.times.seconds(c) for c in calls)
            share = min(1.0, work / together) if together and self.times.hides else 0.0
            for c in calls:
                key = (c.axis, c.op, c.group_size)
                hidden[key] = hidden.get(key, 0.0) + self.times.seconds(c) * share * m
        reductions = [self.times.seconds(c) for c in program.gradient_reductions]
        if reductions:
            c = program.gradient_reductions[0]
            hidden[c.axis, c.op, c.group_size] = sum(reductions) - self._exposed_reduction(reductions, d)
        return hidden

    def _result(
        self,
        layout: Layout,
        step: float,
        timeline: Timeline,
        memory: tuple[StageMemory, ...],
        costs: tuple[CollectiveCost, ...],
        work: dict[str, float],
    ) -> Estimate:
        kernels = self.kernels(layout, shared=False)
        limit = self.cluster.accelerator.memory_bytes
        mfu = self.workload.tokens * self.flops / (step * layout.world * kernels.peak_flops)
        exposed: dict[str, float] = {}
        for cost in costs:
            exposed[cost.axis] = exposed.get(cost.axis, 0.0) + cost.exposed_s
        breakdown = work | {f"{axis} exposed": seconds for axis, seconds in exposed.items()}
        return Estimate(
            layout=layout,
            model=self.model.name,
            cluster=self.cluster.name,
            workload=self.workload,
            step_time_s=step,
            mfu=mfu,
            hfu=mfu * (1 + self.recomputed_flops / self.flops if layout.recompute == "full" else 1),
            bubble=timeline.bubble,
            fits=max(stage.total_bytes for stage in memory) <= limit,
            memory=memory,
            memory_limit_bytes=limit,
            collectives=costs,
            breakdown=breakdown | {"waiting": max(0.0, step - sum(breakdown.values()))},
            evidence={
                "compute": kernels.evidence,
                "communication": self.times.evidence,
                "memory": "formula: the engine's own buffers",
            },
            timeline=timeline,
        )


def estimate(model: Model, cluster: Cluster, workload: Workload, layout: Layout) -> Estimate:
    """Price one layout. Raises UserError when it cannot run this model and workload."""
    return Estimator(model, cluster, workload).estimate(layout)
