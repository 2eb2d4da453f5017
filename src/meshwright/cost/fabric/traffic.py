"""What a layout puts on every link in a step: the estimator's own collectives, over their groups, by their routes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.cost.collectives import Algorithm, CollectiveTimes
from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.flows import load_collective
from meshwright.cost.fabric.routes import Loads, Router
from meshwright.cost.ops import Collective
from meshwright.cost.traffic import step_collectives
from meshwright.schedule.stages import stage_chunks
from meshwright.spec.groups import Ranks, expert_groups, groups, parts, stage_of
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that are alike: one operation, on one kind of group, by one algorithm."""

    axis: str
    op: str
    group_size: int
    stride: int
    algorithm: Algorithm = "ring"

    def covers(self, c: Collective) -> bool:
        return (self.axis, self.op, self.group_size, self.stride) == (c.axis, c.op, c.group_size, c.stride)


Traffic = dict[Kind, Loads]


@dataclass(frozen=True)
class Sends:
    """All that the ranks of some stages send of one kind in a step, over all calls."""

    kind: Kind
    stages: tuple[int, ...]
    bytes: int
    """Of one rank."""
    seconds: float
    """That the estimator takes for them beyond latency."""


def step_sends(estimator: Estimator, layout: Layout) -> tuple[Sends, ...]:
    """Every kind of collective of a step, with the stages that do it. Raises UserError for a layout that cannot run.

    The loads on links follow the rank at the first seat of each stage: where tp or ep cut unevenly (a vocabulary that does not
    divide), others send up to a row less.
    """
    estimator.check(layout)
    m, times = micro_batches(layout, estimator.workload), estimator.times
    out: dict[tuple[Kind, int, float], list[int]] = {}
    for stage, program in enumerate(estimator.programs(layout)):
        totals: dict[Kind, tuple[int, float]] = {}
        for c, calls in step_collectives(program, m):
            # What crosses stages is the same call on each of them: the first stage stands for all.
            if c.axis == "pp" and c.op != "send" and stage > 0:
                continue
            kind = Kind(c.axis, c.op, c.group_size, c.stride, times.algorithm(c))
            nbytes, seconds = totals.get(kind, (0, 0.0))
            totals[kind] = nbytes + calls * c.bytes, seconds + calls * transfer_seconds(times, c)
        for kind, total in totals.items():
            out.setdefault((kind, *total), []).append(stage)
    return tuple(Sends(kind, tuple(stages), nbytes, seconds) for (kind, nbytes, seconds), stages in out.items())


def transfer_seconds(times: CollectiveTimes, c: Collective) -> float:
    """What of a collective's time its bytes take: as many again would add as much. Nothing where a latency hides them."""
    return times.seconds(c._replace(bytes=2 * c.bytes)) - times.seconds(c)


def step_traffic(sends: tuple[Sends, ...], model: Model, layout: Layout, router: Router) -> Traffic:
    """Loads of a step by kind of collective."""
    out: Traffic = {}
    for sent in sends:
        loads = out.setdefault(sent.kind, Loads(router.placement))
        if sent.kind.axis == "pp" and sent.kind.op == "send":
            loads.add(_boundary_loads(sent, model, layout, router))
        else:
            loads.add(load_collective(router, sent.kind.op, sent.kind.algorithm, _groups(sent, layout), float(sent.bytes)))
    return out


def by_axis(traffic: Traffic) -> dict[str, Loads]:
    """Loads of a step summed by axis, in the order in which axes are named."""
    out: dict[str, Loads] = {}
    for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "edp"):
        for kind, loads in traffic.items():
            if kind.axis == axis:
                if axis not in out:
                    out[axis] = loads.scaled(0)
                    out[axis].crossing = np.zeros_like(loads.crossing)
                out[axis].add(loads)
    return out


def _boundary_loads(sent: Sends, model: Model, layout: Layout, router: Router) -> Loads:
    """Activations to the stage of the next chunk, gradients to that of the one before (`cost/program.py`, `boundary`)."""
    loads, rows = Loads(router.placement), groups(layout, ("pp",))
    for stage in sent.stages:
        targets = list(neighbours(model, layout, stage))
        for target in targets:
            router.route(loads, rows[:, stage], rows[:, target], sent.bytes / len(targets))
    return loads


def neighbours(model: Model, layout: Layout, stage: int) -> Iterator[int]:
    """The stages that hold the chunks next to those of `stage`, once for each tensor that it sends them in a micro-batch."""
    every = stage_chunks(model.layers, layout)
    owner = {chunk.place: at for at, chunks in enumerate(every) for chunk in chunks}
    for chunk in every[stage]:
        for place in (chunk.place - 1, chunk.place + 1):
            if owner.get(place, stage) != stage:
                yield owner[place]


def _groups(sent: Sends, layout: Layout) -> Ranks:
    """The groups of a kind, in the stages that do it."""
    rows = kind_groups(layout, sent.kind.axis, sent.kind.group_size, sent.kind.stride)
    if sent.kind.axis == "pp" or len(sent.stages) == layout.pp:
        return rows
    return rows[np.isin(stage_of(layout, rows[:, 0]), sent.stages)]


@lru_cache(maxsize=64)
def kind_groups(layout: Layout, axis: str, size: int, stride: int) -> Ranks:
    """The groups that a `Collective` of this axis, size and stride names: [groups, members]."""
    if axis in ("ep", "etp"):  # counted in ranks of the stage, of which the expert axes are the innermost
        return parts(expert_groups(layout, ("ep", "etp")), size, stride)
    if axis == "edp":
        return parts(expert_groups(layout, ("edp",)), size, max(1, stride // (layout.ep * layout.etp)))
    if axis != "dp" or (size == layout.dp and stride == layout.stride("dp")):
        return parts(groups(layout, (axis,)), size, max(1, stride // layout.stride(axis)))
    nearest = min(layout.stride(name) for name in ("dp", "cp") if layout.degree(name) > 1)
    return parts(groups(layout, ("cp", "dp")), size, max(1, stride // nearest))
