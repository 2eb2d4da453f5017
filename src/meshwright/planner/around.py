"""Around the answer: what memory head-room costs in speed, and what another network, batch or size would change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Estimate
from meshwright.planner.search import plan
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Precision
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

STEP = 0.1
"""Of an accelerator's memory: by so much each further point of the front needs less."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a plan is asked for."""

    model: Model
    cluster: Cluster
    workload: Workload
    gpus: int
    precision: Precision = "bf16"

    def best(self) -> Estimate | None:
        """None where nothing fits, or where nothing is legal."""
        try:
            found = plan(self.model, self.cluster, self.workload, self.gpus, top=1, precision=self.precision)
        except UserError:
            return None
        return found.best.estimate if found.best else None


@dataclass(frozen=True, slots=True)
class Variation:
    """What the best becomes when something changes. `estimate` is None where nothing fits or is legal any more."""

    change: str
    gpus: int
    estimate: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        e = self.estimate
        row: dict[str, Any] = {"change": self.change, "gpus": self.gpus, "layout": str(e.layout) if e else None}
        return row | ({"step_time_s": e.step_time_s, "tokens_per_s": e.tokens_per_s, "mfu": e.mfu} if e else {})


def pareto(problem: Problem, seen: Callable[[Estimate], None] | None = None) -> list[Estimate]:
    """The quickest layout of the problem, and the quickest of those that leave more and more memory free, until none fits. Each is
    the answer of a search of its own with less memory, so that no quicker layout leaves as much; `seen` gets each as it is found."""
    memory = problem.cluster.accelerator.memory_bytes
    exact = Estimator(problem.model, problem.cluster, problem.workload)
    out: list[Estimate] = []
    limit: float = memory
    while limit > 0:
        found = _within(problem, int(limit)).best()
        if found is None:
            break
        out.append(exact.estimate(found.layout))
        if seen:
            seen(out[-1])
        limit = min(limit, found.peak_bytes) - STEP * memory
    return out


def sensitivity(problem: Problem) -> list[Variation]:
    """One more NIC a node, twice the batch, half the nodes: the best of each, by a search of its own."""
    cluster, node, work = problem.cluster, problem.cluster.node, problem.workload
    out = [Variation("as asked", problem.gpus, problem.best())]
    if node.nics:
        more = cluster.model_copy(update={"node": node.model_copy(update={"nics": node.nics + 1})})
        richer = replace(problem, cluster=more)
        out.append(Variation(f"{node.nics + 1} NICs a node instead of {node.nics}", problem.gpus, richer.best()))
    twice = replace(problem, workload=replace(work, global_batch=2 * work.global_batch))
    out.append(Variation(f"global batch {2 * work.global_batch}", problem.gpus, twice.best()))
    if problem.gpus > 1:
        half = problem.gpus // 2
        out.append(Variation(f"{half} accelerators", half, replace(problem, gpus=half).best()))
    return out


def _within(problem: Problem, memory: int) -> Problem:
    accelerator = problem.cluster.accelerator.model_copy(update={"memory_bytes": memory})
    return replace(problem, cluster=problem.cluster.model_copy(update={"accelerator": accelerator}))
