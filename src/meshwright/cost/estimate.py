"""Prices one layout: memory, traffic, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from meshwright.cost.adapt import as_practised, with_buckets_of, with_gradients_of
from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.durations import Durations, OnLinks, PieceTimes
from meshwright.cost.experts import fullest_rank
from meshwright.cost.flops import model_flops_per_token, recomputed_flops
from meshwright.cost.memory import StageMemory, beside_bytes, in_flight_bytes, passing_bytes, stage_memories, state_bytes
from meshwright.cost.offload import OffloadCost, away, host_room
from meshwright.cost.ops import Piece
from meshwright.cost.overlap import Overlap, Passes
from meshwright.cost.peak import Fullest
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.program import Pieces, Place, Program, StagePrograms, boundary, chunk_pieces, rank_program
from meshwright.cost.result import CollectiveCost, Estimate, Price
from meshwright.cost.steady import play_layout, step_end
from meshwright.cost.timeline import ChunkSeconds, Timeline
from meshwright.cost.units import unit_buffer_bytes
from meshwright.schedule.orders import brief_order
from meshwright.schedule.stages import alike_stages
from meshwright.spec.cluster import Cluster
from meshwright.spec.collectives import load_collective_constants
from meshwright.spec.kernels import KernelConstants, load_kernel_constants
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout, check_room, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.residuals import ErrorBar, load_residuals, step_class
from meshwright.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class _State:
    """What the parameters of a stage cost a rank."""

    reductions: tuple[float, ...]
    """Seconds of each bucket's gradient reduction."""
    links: OnLinks
    """Of all of them."""
    rest: float
    """Seconds of the step's other collectives and of the optimizer."""
    passes: Passes
    bytes: int
    program: Program
    """Whose chunks are of one micro-batch and recompute."""


_STATE_FIELDS = tuple(f.name for f in fields(Layout) if f.name != "micro_batch" and not f.name.startswith("recompute"))


class Estimator:
    """Prices layouts of one model, cluster and workload; remembers what layouts share."""

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        workload: Workload,
        practice: Practice = OWN,
        constants: KernelConstants | None = None,
        times: CollectiveTimes | None = None,
    ):
        self.model, self.cluster, self.workload, self.practice = model, cluster, workload, practice
        self.constants = constants or load_kernel_constants()
        self.times = times or CollectiveTimes(cluster, load_collective_constants(), practice.single_ring)
        self.flops = model_flops_per_token(model, workload.seq)
        given = cluster.accelerator.overhead_bytes
        self.overhead = self.constants.overhead_bytes if given is None else given
        self.pieces = PieceTimes(cluster, practice, self.constants, self.times)
        self.durations, self.kernels = self.pieces.durations, self.pieces.kernels
        self.overlap = Overlap(self.pieces, workload)
        self._adapted: dict[tuple[object, ...], tuple[Piece, Piece]] = {}
        self._states: dict[tuple[object, ...], _State] = {}
        self._ends: dict[Layout, float] = {}
        self._known_peaks: dict[Layout, int] = {}

    def estimate(self, layout: Layout) -> Estimate:
        """Price `layout` by playing its schedule. Raises UserError for a layout that cannot be run."""
        self.check(layout)
        m = micro_batches(layout, self.workload)
        schedule = brief_order(layout, m)
        stages = self._programs(layout)
        memory = (one for at, p in stages.items() for one in stage_memories(p, layout, schedule, at, self.overhead))
        send = self.send_seconds(layout)
        alone = [
            self.overlap.passing(self.durations(p.pieces, layout, shared=False), self.overlap.passes(p, layout))
            for p in stages.values()
        ]
        seconds = {stage: each for at, p in stages.items() for each in [self._chunk_seconds(p, layout)] for stage in at}
        timeline = play_layout(layout, m, [seconds[stage] for stage in range(layout.pp)], send, self._ends.get(layout))
        end = max(self.overlap.step_end(p, layout, d) for p, d in zip(stages.values(), alone, strict=True))
        # On the timeline no send waits for another, but a stage has one link, which they all share.
        sending = max(len(p.boundary) for p in stages.values()) * m * send
        step = max(timeline.end, self._shared_floor(layout, stages), sending) + end
        # Between fill and drain a send runs beside computation; filling and draining wait for one hop a stage each.
        under_pairs = [timeline.hidden(at[0]) for at in stages]
        costs = self.overlap.collective_costs(stages, layout, alone, under_pairs, 2 * (layout.pp - 1) * send)
        compute = max(d.compute for d in alone) * m
        kernels = self.kernels(layout, shared=True)
        optimizer = max(kernels.elementwise(p.optimizer) for p in stages.values())
        work, offload = {"compute": compute, "optimizer": optimizer}, self.overlap.offload_cost(stages, layout)
        if offload is not None:
            work["offload exposed"] = offload.exposed_s
        recomputed, ordered = self._recomputed_share(stages, layout), sorted(memory, key=lambda one: one.stage)
        return self._result(layout, step, timeline, tuple(ordered), costs, work, offload, recomputed)

    def _recomputed_share(self, stages: StagePrograms, layout: Layout) -> float:
        """FLOPs that all ranks run again, over those that the model needs."""
        experts, uneven = self.model.experts, self.workload.expert_imbalance
        fullest = fullest_rank(experts, layout, uneven) if experts else 1.0
        each = sum(
            recomputed_flops(piece.recomputed, fullest) * repeat * len(at)
            for at, p in stages.items()
            for piece, repeat in p.pieces
        )
        passes = micro_batches(layout, self.workload) * layout.world // layout.pp
        return each * passes / (self.workload.tokens * self.flops)

    def played(self, layout: Layout) -> Price:
        """Step time and peak as in `estimate`, without its tables: for pricing many layouts."""
        m = micro_batches(layout, self.workload)
        seconds: list[list[ChunkSeconds]] = [[] for _ in range(layout.pp)]
        send, most = self.send_seconds(layout), 0
        end = floor = 0.0
        for members in alike_stages(self.model, layout):
            state, chunks = self._state(layout, members[0]), self._chunks(layout, members[0])
            pieces = tuple(piece for chunk in chunks for piece in chunk)
            each = [
                self.overlap.passing(self.durations(c, layout, shared=False), state.passes.of_one(len(chunks)))
                for c in chunks
            ]
            whole = self.overlap.passing(self.durations(pieces, layout, shared=False), state.passes)
            end = max(end, self.overlap.exposed_reduction(state.reductions, state.links, whole) + state.rest)
            most = max(most, len(boundary(self.model, layout, self.workload.seq, members[0])))
            for stage in members:
                seconds[stage] = [self._in_schedule(d, layout) for d in each]
            if self.cluster.node.compute_slots is not None:
                busy = self.durations(pieces, layout, shared=True)
                floor += (busy.forward + busy.backward) * len(members) * m / layout.pp
        pipelined = self._ends[layout] = step_end(layout, m, seconds, send)
        step = max(pipelined, floor if layout.world > 1 else 0.0, most * m * send) + end
        peak = self._known_peaks.get(layout) or max(self._peaks(layout))
        return Price(step, peak, peak <= self.cluster.accelerator.memory_bytes and self.host_holds(layout))

    def fits(self, layout: Layout) -> bool:
        """What `played` says of it, without its time."""
        if not self.host_holds(layout):
            return False
        most, limit = 0, self.cluster.accelerator.memory_bytes
        for peak in self._peaks(layout):
            if peak > limit:
                return False
            most = max(most, peak)
        self._known_peaks[layout] = most
        return True

    def host_holds(self, layout: Layout) -> bool:
        """Whether hosts have room for what `layout` offloads."""
        if layout.offload == "none":
            return True
        programs = (self._state(layout, members[0]).program for members in alike_stages(self.model, layout))
        return max(away(program, layout).kept for program in programs) <= host_room(self.cluster, layout)

    def _peaks(self, layout: Layout) -> Iterator[int]:
        """Bytes of a rank of each stage."""
        m = micro_batches(layout, self.workload)
        schedule = brief_order(layout, m)
        for members in alike_stages(self.model, layout):
            state, program = self._state(layout, members[0]), self._program(layout, members[0])
            if self.practice == OWN:
                fullest, beside = Fullest(program, layout, schedule), beside_bytes(program, m)
                passing = [fullest.of(stage).total + beside for stage in members]
            else:  # other software lets go of whole gradients layer by layer
                sent = sum(c.bytes for c in program.boundary)
                held = (in_flight_bytes(program.chunks, schedule, stage, layout) for stage in members)
                passing = [sum(passing_bytes(program.pieces, activations, sent).values()) for activations in held]
            yield from (int(state.bytes + each + self.overhead) for each in passing)

    def _chunks(self, layout: Layout, stage: int) -> tuple[Pieces, ...]:
        its = chunk_pieces(self.model, layout, self.workload, Place(stage))
        return tuple(self._practised(chunk, layout) for chunk in its)

    def _state(self, layout: Layout, stage: int) -> _State:
        """What a stage's parameters cost, whatever the micro-batch: layouts that share it plan their buckets once."""
        key = (*(getattr(layout, name) for name in _STATE_FIELDS), stage)
        if key not in self._states:
            program = self.reduced_program(layout, Place(stage))
            self._states[key] = _State(
                tuple(self.times.seconds(c) for c in program.gradient_reductions),
                self.pieces.on_links(program.gradient_reductions),
                self.overlap.rest(program, layout),
                self.overlap.passes(program, layout),
                self._state_bytes(program, layout) + unit_buffer_bytes(program, layout),
                program,
            )
        return self._states[key]

    def _state_bytes(self, program: Program, layout: Layout) -> int:
        held = state_bytes(program, layout, self.practice.gradient_bytes)
        return held["parameters"] if self.practice.frozen else sum(held.values())

    def programs(self, layout: Layout) -> list[Program]:
        """Each stage's program; stages that hold the same share one."""
        each = {stage: program for members, program in self._programs(layout).items() for stage in members}
        return [each[stage] for stage in range(layout.pp)]

    def _programs(self, layout: Layout) -> StagePrograms:
        return {members: self._program(layout, members[0]) for members in alike_stages(self.model, layout)}

    def _program(self, layout: Layout, stage: int) -> Program:
        sends = boundary(self.model, layout, self.workload.seq, stage)
        return replace(self._state(layout, stage).program, chunks=self._chunks(layout, stage), boundary=sends)

    def reduced_program(self, layout: Layout, place: Place) -> Program:
        """The program of a rank, its gradients reduced in the widths and buckets of the practice."""
        program = rank_program(self.model, layout, self.workload, place)
        if self.practice == OWN:
            return program
        return with_buckets_of(with_gradients_of(program, layout, self.practice), self.practice.bucket_bytes)

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

    def _chunk_seconds(self, program: Program, layout: Layout) -> list[ChunkSeconds]:
        """Of each chunk of a stage; what ZeRO sends is shared out evenly."""
        passes = self.overlap.passes(program, layout).of_one(len(program.chunks))
        each = [self.overlap.passing(self.durations(pieces, layout, shared=False), passes) for pieces in program.chunks]
        return [self._in_schedule(d, layout) for d in each]

    def _in_schedule(self, d: Durations, layout: Layout) -> ChunkSeconds:
        """In pairs the way to and from experts runs under the other pass, except where ranks share the cores that move the bytes."""
        if not (layout.async_ep and self.times.hides):
            return ChunkSeconds(d.forward, d.backward, d.weight)
        return ChunkSeconds(d.forward, d.backward, d.weight, d.forward_experts, d.backward_experts, self.constants.beside)

    def send_seconds(self, layout: Layout) -> float:
        sends = boundary(self.model, layout, self.workload.seq, 0)
        return self.times.seconds(sends[0]) if sends else 0.0

    def _shared_floor(self, layout: Layout, stages: StagePrograms) -> float:
        """Where ranks share cores, the step cannot be shorter than all the work at the rate that all of them together reach."""
        if self.cluster.node.compute_slots is None or layout.world == 1:
            return 0.0
        busy = [(self.durations(p.pieces, layout, shared=True), len(at)) for at, p in stages.items()]
        return micro_batches(layout, self.workload) * sum((d.forward + d.backward) * count for d, count in busy) / layout.pp

    def _result(
        self,
        layout: Layout,
        step: float,
        timeline: Timeline,
        memory: tuple[StageMemory, ...],
        costs: tuple[CollectiveCost, ...],
        work: dict[str, float],
        offload: OffloadCost | None,
        recomputed: float,
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
            hfu=mfu * (1 + recomputed),
            bubble=timeline.bubble,
            fits=max(stage.total_bytes for stage in memory) <= limit and self.host_holds(layout),
            memory=memory,
            memory_limit_bytes=limit,
            host_limit_bytes=host_room(self.cluster, layout),
            collectives=costs,
            breakdown=breakdown | {"waiting": max(0.0, step - sum(breakdown.values()))},
            evidence={
                "compute": kernels.evidence,
                "communication": self.times.evidence,
                "memory": "formula: the engine's own buffers",
                **({"offload": self.overlap.links(layout).evidence} if offload else {}),
            },
            error_bar=self._error_bar(layout),
            offload=offload,
            timeline=timeline,
        )

    def _error_bar(self, layout: Layout) -> ErrorBar | None:
        """Measured machines are not those of the published runs, nor are CPUs."""
        node = self.cluster.node
        if self.cluster.measured or node.compute_slots is not None:
            return None
        of = step_class(-(-layout.world // node.accelerators), self.model.experts is not None)
        return load_residuals().step_time.get(of)


def estimate(model: Model, cluster: Cluster, workload: Workload, layout: Layout) -> Estimate:
    """Price one layout. Raises UserError when it cannot run this model and workload."""
    return Estimator(model, cluster, workload).estimate(layout)
