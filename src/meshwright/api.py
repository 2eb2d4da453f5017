"""The Python API: what the command line does, with names or objects.

import meshwright
e = meshwright.estimate(model="llama-3-70b", cluster="h100-superpod", gpus=640, seq=4096, global_batch=1280,
                        layout="dp20:zero1 tp8:sp pp4 mb1")
e.mfu, e.tokens_per_s, e.as_dict()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from meshwright.cost.economics import Bill
from meshwright.cost.estimate import Estimate, Estimator
from meshwright.planner.bill import Terms, training_bill
from meshwright.planner.recompute import Fitted, fit_recompute
from meshwright.planner.stages import Balanced, balance_stages
from meshwright.schedule.stages import alike_stages, first_rank
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.legality import check_world
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.sizes import parse_bytes
from meshwright.spec.workload import Workload
from meshwright.trace.result import Trace

if TYPE_CHECKING:
    from meshwright.planner.search import Plan
    from meshwright.trace.check import Check


def estimate(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    gpus: int | None = None,
) -> Estimate:
    """Price one layout.

    `model` and `cluster`: catalogue name, path, or object. `seq`: tokens; `global_batch`: sequences a step. `gpus`: checked
    against the layout's world when given. Raises UserError for anything that does not fit together.
    """
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    if gpus is not None:
        check_world(parsed, gpus)
    return Estimator(_model(model), _cluster(cluster), Workload(seq, global_batch)).estimate(parsed)


def trace(
    *,
    model: str | Model,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    gpus: int | None = None,
    ranks: Sequence[int] | None = None,
    stages: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Trace:
    """Run one step of the real engine for some ranks of the layout, of any world size, in this process and without its memory.

    `ranks`, or `stages`, of which the first rank is taken; by default one stage of each kind. `progress` is told what comes next.
    Needs the `run` extra. Raises UserError for what does not fit together, and for layouts that cannot be traced.
    """
    from meshwright.trace.engine import trace_ranks  # torch

    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    if gpus is not None:
        check_world(parsed, gpus)
    known, workload = _model(model), Workload(seq, global_batch)
    if ranks is None:
        wanted = [members[0] for members in alike_stages(known, parsed)] if stages is None else stages
        ranks = [first_rank(parsed, stage) for stage in wanted]
    traced = trace_ranks(known, parsed, workload, ranks, progress=progress)
    return Trace(known.name, parsed, workload, traced)


def check(
    *,
    model: str | Model,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[Check, ...]:
    """What the estimate says of each kind of stage beside what its trace has seen; arguments as in `trace`."""
    from meshwright.trace.check import check_stage

    known = _model(model)
    traced = trace(model=known, layout=layout, seq=seq, global_batch=global_batch, progress=progress)
    return tuple(check_stage(stage, known, traced.layout, traced.workload) for stage in traced.stages)


def recompute(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    memory_budget: str | int,
) -> Fitted:
    """Choose what `layout` recomputes so that a rank stays within `memory_budget` (bytes, or such as "60GiB"), at the least cost in
    time; other arguments as in `estimate`. Raises UserError when even recomputing all is not enough."""
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    estimator = Estimator(_model(model), _cluster(cluster), Workload(seq, global_batch))
    return fit_recompute(estimator, parsed, parse_bytes(memory_budget))


def balance(*, model: str | Model, cluster: str | Cluster, layout: str | Layout, seq: int, global_batch: int) -> Balanced:
    """Cut the pipeline of `layout` into stages of equal cost; arguments as in `estimate`."""
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    return balance_stages(Estimator(_model(model), _cluster(cluster), Workload(seq, global_batch)), parsed)


def bill(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    tokens: float,
    terms: Terms | None = None,
) -> tuple[Estimate, Bill]:
    """What a run of `tokens` costs under a layout; other arguments as in `estimate`."""
    known_model, known_cluster = _model(model), _cluster(cluster)
    priced = estimate(model=known_model, cluster=known_cluster, layout=layout, seq=seq, global_batch=global_batch)
    return priced, training_bill(priced, known_model, known_cluster, tokens, terms)


def plan(
    *,
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    top: int = 5,
    precision: Precision = "bf16",
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Search for the quickest layout that fits; arguments as in `estimate`. `progress` gets the number priced so far."""
    from meshwright.planner.search import plan as search  # the search alone needs NumPy

    if gpus < 1:
        raise UserError(f"gpus must be at least 1, got {gpus}")
    workload = Workload(seq, global_batch)
    return search(_model(model), _cluster(cluster), workload, gpus, top=top, precision=precision, progress=progress)


def _model(model: str | Model) -> Model:
    return load_model(model) if isinstance(model, str) else model


def _cluster(cluster: str | Cluster) -> Cluster:
    return load_cluster(cluster) if isinstance(cluster, str) else cluster
