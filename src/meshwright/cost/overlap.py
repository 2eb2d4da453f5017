"""What runs beside computation, and what of it is left exposed: ZeRO's gathers and sums, gradient buckets, offloaded state.

A price of pieces (`durations.py`) knows what hides inside a layer; this adds what accompanies whole passes and what follows the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshwright.cost.durations import Durations, OnLinks, PieceTimes
from meshwright.cost.offload import PLACES, Links, OffloadCost, away, offload_links
from meshwright.cost.ops import Collective, Under
from meshwright.cost.program import Program, StagePrograms
from meshwright.cost.result import CollectiveCost
from meshwright.cost.traffic import step_collectives
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of what the state of a stage needs in each forward and backward of a micro-batch."""

    forward: OnLinks
    """ZeRO's communication."""
    backward: OnLinks
    casts: float
    """Of parameters, in either."""
    forward_read: float = 0.0
    """Reading offloaded parameters."""
    backward_read: float = 0.0

    def of_one(self, chunks: int) -> Passes:
        """Shared out evenly."""
        forward, backward = (OnLinks(*(seconds / chunks for seconds in sent)) for sent in (self.forward, self.backward))
        return Passes(forward, backward, self.casts / chunks, self.forward_read / chunks, self.backward_read / chunks)


class Overlap:
    """Of one workload, with the prices of `pieces`."""

    def __init__(self, pieces: PieceTimes, workload: Workload):
        self.pieces, self.workload = pieces, workload

    def passes(self, program: Program, layout: Layout) -> Passes:
        """Parameter gathers and gradient reductions that ZeRO-2 and 3 do in each pass, casts, and reads of what is offloaded."""
        gathers = program.gathers
        forward, backward = (self.pieces.on_links(calls) for calls in (gathers[0], (*gathers[1], *program.scatters)))
        casts = self.pieces.kernels(layout, shared=False).elementwise(program.casts) if program.casts.bytes else 0.0
        if layout.offload != "all":
            return Passes(forward, backward, casts)
        moved, links = away(program, layout), self.links(layout)
        return Passes(forward, backward, casts, links.seconds(moved.forward_read, 0), links.seconds(moved.backward_read, 0))

    def passing(self, d: Durations, passes: Passes) -> Durations:
        """`d` with communication and reads of each pass that run under its computation, of which what does not fit is exposed, and
        with the casts that its computation waits for."""
        forward = self._exposed_pass(passes.forward, passes.forward_read, d.forward, d.forward_links) + passes.casts
        backward = self._exposed_pass(passes.backward, passes.backward_read, d.backward, d.backward_links) + passes.casts
        return d._replace(forward=d.forward + forward, backward=d.backward + backward, compute=d.compute + 2 * passes.casts)

    def _exposed_pass(self, sent: OnLinks, read: float, work: float, own: OnLinks) -> float:
        """Links to other ranks and to the host are busy at the same time, except where ranks share the cores that move the bytes.
        `own`: what the pass itself sends."""
        if not self.pieces.times.hides:
            return sum(sent) + read
        return self.pieces.beside(max(sum(sent), read), work, max(sent.and_(own)))

    def links(self, layout: Layout) -> Links:
        """To where a layout offloads."""
        return offload_links(self.pieces.cluster, layout, self.pieces.kernels(layout, shared=True).memory_bandwidth)

    def _exposed_update(self, program: Program, layout: Layout) -> float:
        """Offloaded state is read and written beside the update of other buckets, but for the first read and the last write."""
        if layout.offload == "none":
            return 0.0
        moved, links = away(program, layout), self.links(layout)
        seconds = links.seconds(moved.update_read, moved.update_written)
        if not self.pieces.times.hides:
            return seconds
        update = self.pieces.kernels(layout, shared=True).elementwise(program.optimizer)
        ends = links.seconds(moved.first_read, 0) + links.seconds(0, moved.last_written)
        return max(0.0, seconds - update) + min(seconds, ends)

    def offload_cost(self, stages: StagePrograms, layout: Layout) -> OffloadCost | None:
        """Of the stage that keeps most away; None without offload."""
        if layout.offload == "none":
            return None
        m, links = micro_batches(layout, self.workload), self.links(layout)
        each = [(away(program, layout), members[0], program) for members, program in stages.items()]
        moved, stage, program = max(each, key=lambda one: one[0].kept)
        passes, d = self.passes(program, layout), self.pieces.durations(program.pieces, layout, shared=False)
        without = replace(passes, forward_read=0.0, backward_read=0.0)
        with_reads, bare = self.passing(d, passes), self.passing(d, without)
        exposed = m * (with_reads.forward + with_reads.backward - bare.forward - bare.backward)
        update = links.seconds(moved.update_read, moved.update_written)
        return OffloadCost(
            where=PLACES[layout.offload_to],
            stage=stage,
            kept_bytes=moved.kept,
            read_bytes=moved.read(m),
            written_bytes=moved.written,
            time_s=update + m * (passes.forward_read + passes.backward_read),
            exposed_s=exposed + self._exposed_update(program, layout),
        )

    def step_end(self, program: Program, layout: Layout, d: Durations) -> float:
        """After the last backward: what is left of the gradient reduction, the step's other collectives, the optimizer."""
        reductions = tuple(self.pieces.times.seconds(c) for c in program.gradient_reductions)
        links = self.pieces.on_links(program.gradient_reductions)
        return self.exposed_reduction(reductions, links, d) + self.rest(program, layout)

    def rest(self, program: Program, layout: Layout) -> float:
        """The step's other collectives, the optimizer, and what it waits for of offloaded state."""
        if self.pieces.practice.frozen:
            return 0.0
        hidden = ("all_gather",) if self.pieces.practice.overlaps_gathers and self.pieces.times.hides else ()
        sent = sum(self.pieces.times.seconds(c) for c in program.step_end if c.op not in hidden) + self._exposed_update(
            program, layout
        )
        return sent + self.pieces.kernels(layout, shared=True).elementwise(program.optimizer)

    def exposed_reduction(self, reductions: Sequence[float], links: OnLinks, d: Durations) -> float:
        """All but the last bucket can run under the last micro-batch's backward, beside what that puts on the `links` that they take."""
        if self.pieces.practice.frozen:
            return 0.0
        if not reductions or not self.pieces.times.hides or not self.pieces.practice.overlaps_gradients:
            return sum(reductions)
        return max(reductions[-1], self.pieces.beside(sum(reductions), d.backward, max(links.and_(d.backward_links))))

    def collective_costs(
        self,
        stages: StagePrograms,
        layout: Layout,
        alone: list[Durations],
        under_pairs: Sequence[float],
        exposed_sends: float,
    ) -> tuple[CollectiveCost, ...]:
        """`alone` and `under_pairs`, seconds of communication with experts that the other pass of a pair hides: of each group of stages."""
        m = micro_batches(layout, self.workload)
        best: dict[tuple[str, str, int], CollectiveCost] = {}
        for (members, program), d, under_pair in zip(stages.items(), alone, under_pairs, strict=True):
            hidden = self._hidden_by_kind(program, layout, d, m)
            rows: dict[tuple[str, str, int], list[tuple[Collective, int]]] = {}
            for c, times in step_collectives(program, m):
                rows.setdefault((c.axis, c.op, c.group_size), []).append((c, times))
            for key, calls in rows.items():
                seconds = sum(self.pieces.times.seconds(c) * times for c, times in calls)
                beside = hidden.get(key, 0.0) + (under_pair if key[0] == "ep" else 0.0)  # which is all of one kind
                exposed = exposed_sends if key[:2] == ("pp", "send") else max(0.0, seconds - beside)
                nbytes = sum(c.bytes * times for c, times in calls)
                if key not in best or nbytes > best[key].bytes:
                    link = self.pieces.times.link(calls[0][0])
                    best[key] = CollectiveCost(*key, members[0], link, sum(t for _, t in calls), nbytes, seconds, exposed)
        return tuple(best[key] for key in sorted(best))

    def _hidden_by_kind(self, program: Program, layout: Layout, d: Durations, m: int) -> dict[tuple[str, str, int], float]:
        """Seconds of communication that run under computation, by (axis, op, group size)."""
        kernels = self.pieces.kernels(layout, shared=False)
        hidden: dict[tuple[str, str, int], float] = {}
        for piece, repeat in program.pieces:
            for op in (*piece.forward, *piece.backward):
                if isinstance(op, Under):
                    c = op.collective
                    gained = self.pieces.times.seconds(c) * op.calls - self.pieces.exposed(
                        op, self.pieces.work(op, kernels)
                    )
                    key = (c.axis, c.op, c.group_size)
                    hidden[key] = hidden.get(key, 0.0) + gained * repeat * m
        bare = self.pieces.durations(program.pieces, layout, shared=False)
        for calls, work, own in (
            (program.gathers[0], bare.forward, bare.forward_links),
            ((*program.gathers[1], *program.scatters), bare.backward, bare.backward_links),
        ):
            sent = self.pieces.on_links(calls)
            share = 1 - self._exposed_pass(sent, 0.0, work, own) / sum(sent) if any(sent) else 0.0
            for c in calls:
                key = (c.axis, c.op, c.group_size)
                hidden[key] = hidden.get(key, 0.0) + self.pieces.times.seconds(c) * share * m
        reductions = [self.pieces.times.seconds(c) for c in program.gradient_reductions]
        if reductions:
            c = program.gradient_reductions[0]
            hidden[c.axis, c.op, c.group_size] = sum(reductions) - self.exposed_reduction(
                reductions, self.pieces.on_links(program.gradient_reductions), d
            )
        return hidden
