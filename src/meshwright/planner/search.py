"""Search for the best layout: the whole legal space by closed form, then the schedule played for those that lead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from meshwright.cost.estimate import Estimate, Estimator, Quick
from meshwright.planner.explain import alternatives, reason_against
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.legality import check_layout, refuse_unbuilt_model, refuse_unpriced
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

MAX_MICRO_BATCH = 16
"""Sequences. Larger ones only add memory: the GEMMs of 16 sequences of any length worth training on are large."""
PLAYED = 6
"""Leaders whose schedule is played in full; the closed form differs only for some short pipelines, by a few per cent."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its price and, unless it is the best, the main reason why it loses."""

    estimate: Estimate
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {**self.estimate.as_dict(), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of a search. `best` is None when nothing fits: then `candidates` has the one that comes nearest."""

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    """The best and the runners-up, quickest first."""
    alternatives: tuple[tuple[str, Candidate], ...]
    """What people would try first, each with the reason why it loses."""
    searched: int
    fitting: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.as_dict() if self.best else None,
            "candidates": [c.as_dict() for c in self.candidates],
            "alternatives": [{"name": name, **c.as_dict()} for name, c in self.alternatives],
            "searched": self.searched,
            "fitting": self.fitting,
            "seconds": self.seconds,
        }


def plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    gpus: int,
    *,
    top: int = 5,
    precision: Precision = "bf16",
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The quickest layout that fits `gpus` accelerators, its `top - 1` runners-up, and why the obvious others lose.

    `progress` is called with the number of layouts priced so far. Raises UserError when no layout is legal at all.
    """
    began = time.perf_counter()
    refuse_unpriced(precision)
    check_layout(Layout(), model, workload)  # what one rank cannot run, no split can
    refuse_unbuilt_model(model)
    estimator = Estimator(model, cluster, workload)
    priced: list[tuple[Layout, Quick]] = []
    for layout in legal_layouts(model, workload, gpus, precision):
        priced.append((layout, estimator.quick(layout)))
        if progress:
            progress(len(priced))
    if not priced:
        raise _nothing_legal(model, workload, gpus)
    priced.sort(key=lambda item: item[1].step_time_s)
    fitting = [item for item in priced if item[1].fits]
    # Only what fits when played leads: should one not, the next takes its place.
    played = (estimator.estimate(layout) for layout, _ in fitting)
    leaders = sorted(islice((e for e in played if e.fits), max(PLAYED, top)), key=lambda e: e.step_time_s)
    if not leaders:
        nearest = estimator.estimate(min(priced, key=lambda item: item[1].peak_bytes)[0])
        lone = Candidate(nearest, reason_against(nearest, None))
        return Plan(None, (lone,), (), len(priced), 0, time.perf_counter() - began)
    best = Candidate(leaders[0], "the quickest layout that fits")
    runners_up = [Candidate(e, reason_against(e, best.estimate)) for e in leaders[1:top]]
    others = []
    for name, layout in alternatives(best.estimate.layout, priced, cluster.fabric.domain):
        estimate = estimator.estimate(layout)
        others.append((name, Candidate(estimate, reason_against(estimate, best.estimate))))
    return Plan(best, (best, *runners_up), tuple(others), len(priced), len(fitting), time.perf_counter() - began)


def legal_layouts(model: Model, workload: Workload, gpus: int, precision: Precision) -> Iterator[Layout]:
    """Every layout of dp, tp, pp that fills `gpus` ranks and divides the model and the batch, with its modes.

    GPipe is left out: its bubble is that of 1F1B and its memory never less.
    """
    for tp in divisors(gpus):
        for pp in divisors(gpus // tp):
            dp = gpus // tp // pp
            if pp > model.layers or workload.global_batch % dp:
                continue
            base = Layout(dp=dp, tp=tp, pp=pp, precision=precision)
            if _illegal(base, model, workload):
                continue
            for micro_batch in divisors(workload.global_batch // dp):
                if micro_batch <= MAX_MICRO_BATCH:
                    yield from _modes(replace(base, micro_batch=micro_batch), model, workload)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _modes(base: Layout, model: Model, workload: Workload) -> Iterator[Layout]:
    sequence = (True, False) if base.tp > 1 and base.micro_batch * workload.seq % base.tp == 0 else (False,)
    for sp in sequence:
        for zero in (0, 1) if base.dp > 1 else (0,):
            for recompute in ("none", "full"):
                yield replace(base, sp=sp, zero=zero, recompute=recompute)


def _illegal(layout: Layout, model: Model, workload: Workload) -> bool:
    try:
        check_layout(layout, model, workload)
    except UserError:
        return True
    return False


def _nothing_legal(model: Model, workload: Workload, gpus: int) -> UserError:
    legal = (n for n in range(gpus - 1, 0, -1) if any(True for _ in legal_layouts(model, workload, n, "bf16")))
    near = list(islice(legal, 2))
    return UserError(
        f"no layout of {gpus} ranks divides {model.name} ({model.layers} layers, {model.heads} heads) and a global batch of "
        f"{workload.global_batch}: dp must divide the batch; try {' or '.join(map(str, near))} ranks or another batch"
    )
