"""The Python API: what the command line does, with names or objects.

import meshwright
e = meshwright.estimate(model="llama-3-70b", cluster="h100-superpod", gpus=640, seq=4096, global_batch=1280,
                        layout="dp20:zero1 tp8:sp pp4 mb1")
e.mfu, e.tokens_per_s, e.as_dict()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_args

from meshwright.cost.estimate import Estimator
from meshwright.cost.practice import Attention, Practice
from meshwright.cost.result import Estimate
from meshwright.schedule.stages import alike_stages, first_rank
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError, choices
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout, Precision
from meshwright.spec.legality import check_world
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.spec.sizes import parse_bytes
from meshwright.spec.workload import Workload

if TYPE_CHECKING:  # what one function needs it imports: an estimate is asked for more often than all the rest
    from meshwright.cost.economics import Bill
    from meshwright.cost.fabric.view import FabricView
    from meshwright.planner.around import Problem, Variation
    from meshwright.planner.bill import Terms
    from meshwright.planner.lint import Linted
    from meshwright.planner.objectives import Sizing
    from meshwright.planner.recompute import Fitted
    from meshwright.planner.search import Plan
    from meshwright.planner.stages import Balanced
    from meshwright.planner.ways import WayOut
    from meshwright.trace.check import Check
    from meshwright.trace.result import StageTrace, Trace

PER = 1e12
"""Tokens that a cost is stated for where a person gives none."""


def estimate(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    gpus: int | None = None,
    expert_imbalance: float = 1.0,
) -> Estimate:
    """Price one layout.

    `model` and `cluster`: catalogue name, path, or object. `seq`: tokens; `global_batch`: sequences a step. `gpus`: checked
    against the layout's world when given. `expert_imbalance`: rows of the fullest expert over the mean. Raises UserError for anything
    that does not fit together.
    """
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    if gpus is not None:
        check_world(parsed, gpus)
    workload = Workload(seq, global_batch, expert_imbalance)
    return Estimator(_model(model), _cluster(cluster), workload).estimate(parsed)


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
    from meshwright.trace.result import Trace

    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    if gpus is not None:
        check_world(parsed, gpus)
    known, workload = _model(model), Workload(seq, global_batch)
    if ranks is None:
        wanted = [members[0] for members in alike_stages(known, parsed)] if stages is None else stages
        ranks = [first_rank(parsed, stage) for stage in wanted]
    traced = trace_ranks(known, parsed, workload, ranks, progress=progress)
    return Trace(known.name, parsed, workload, traced)


def trace_huggingface(
    *, config: str, seq: int, micro_batch: int = 1, precision: str = "bf16", recompute: bool = False
) -> StageTrace:
    """Run one step of any causal language model of `transformers`, unsharded on one device, in this process and without its memory.

    `config`: a config.json, a directory that holds one, or a catalogue name. `precision`: bf16 or fp32 for all that is kept, or mixed,
    which is fp32 under autocast to bf16. `recompute`: the model's gradient checkpointing. Needs the `hf` extra.
    """
    from meshwright.trace.huggingface import Plain  # torch
    from meshwright.trace.huggingface import trace_huggingface as run

    return run(config, Plain(seq, micro_batch, precision, recompute))


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


def fabric(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    gpus: int | None = None,
    what_if: Sequence[str] = (),
    orders: bool = False,
    slower: float = 0.01,
    queue_pairs: int | None = None,
) -> FabricView:
    """What a layout puts on the links of the cluster, and what they make of its step; first arguments as in `estimate`.

    `what_if`: any of lose-link, lose-nic, slow-gpu=SHARE, shuffle-nodes; `orders`: try every rank order; `slower`: the share of the
    step that a tolerated oversubscription may cost; `queue_pairs`: of a connection, where the fabric hashes flows to links.
    """
    from meshwright.cost.fabric.view import view_fabric  # needs NumPy

    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    if gpus is not None:
        check_world(parsed, gpus)
    estimator = Estimator(_model(model), _cluster(cluster), Workload(seq, global_batch))
    return view_fabric(estimator, parsed, what_ifs=tuple(what_if), orders=orders, slower=slower, queue_pairs=queue_pairs)


def recompute(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    memory_budget: str | int,
    expert_imbalance: float = 1.0,
) -> Fitted:
    """Choose what `layout` recomputes so that a rank stays within `memory_budget` (bytes, or such as "60GiB"), at the least cost in
    time; other arguments as in `estimate`. Raises UserError when even recomputing all is not enough."""
    from meshwright.planner.recompute import fit_recompute

    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    estimator = Estimator(_model(model), _cluster(cluster), Workload(seq, global_batch, expert_imbalance))
    return fit_recompute(estimator, parsed, parse_bytes(memory_budget))


def balance(*, model: str | Model, cluster: str | Cluster, layout: str | Layout, seq: int, global_batch: int) -> Balanced:
    """Cut the pipeline of `layout` into stages of equal cost; arguments as in `estimate`."""
    from meshwright.planner.stages import balance_stages

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
    from meshwright.planner.bill import training_bill

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
    expert_imbalance: float = 1.0,
    refine: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Search for the quickest layout that fits; arguments as in `estimate`. `refine`: try on the finalists what the search leaves
    out. `progress` gets the number priced so far."""
    from meshwright.planner.search import plan as search  # the search alone needs NumPy

    p = _problem(model, cluster, gpus, seq, global_batch, precision, expert_imbalance)
    found = search(p.model, p.cluster, p.workload, gpus, top=top, precision=precision, progress=progress)
    if not refine:
        return found
    from meshwright.planner.refine import refined

    return refined(found, Estimator(p.model, p.cluster, p.workload))


def pareto(
    *,
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    precision: Precision = "bf16",
    expert_imbalance: float = 1.0,
) -> list[Estimate]:
    """The front of speed against memory left free; arguments as in `plan`."""
    from meshwright.planner.around import pareto as front

    return front(_problem(model, cluster, gpus, seq, global_batch, precision, expert_imbalance))


def sensitivity(
    *,
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    precision: Precision = "bf16",
    expert_imbalance: float = 1.0,
) -> list[Variation]:
    """What the best becomes with one more NIC a node, twice the batch, half the nodes; arguments as in `plan`."""
    from meshwright.planner.around import sensitivity as vary

    return vary(_problem(model, cluster, gpus, seq, global_batch, precision, expert_imbalance))


def ways_out(
    nearest: Estimate,
    *,
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    precision: Precision = "bf16",
    expert_imbalance: float = 1.0,
) -> list[WayOut]:
    """The three cheapest changes after which the layout of `nearest` fits; arguments as in `plan`."""
    from meshwright.planner.ways import ways_out as ways

    p = _problem(model, cluster, gpus, seq, global_batch, precision, expert_imbalance)
    return ways(Estimator(p.model, p.cluster, p.workload), nearest.layout)


def size(
    *,
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    precision: Precision = "bf16",
    expert_imbalance: float = 1.0,
    objective: str = "time",
    tokens: float | None = None,
    deadline: float | None = None,
    budget: float | None = None,
    terms: Terms | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sizing:
    """How many of up to `gpus` accelerators: the fewest that train `tokens` within `deadline` seconds, the quickest that `budget` USD
    pay for, or (objective "cost") those whose tokens are cheapest."""
    from meshwright.planner.bill import Terms
    from meshwright.planner.objectives import Sizer

    if objective not in ("time", "cost"):
        raise choices(objective, ("time", "cost"), "objective")
    if (objective == "cost") + (deadline is not None) + (budget is not None) != 1:
        raise UserError("give one of --objective cost, --deadline and --budget")
    if tokens is None and objective != "cost":
        raise UserError("a deadline or a budget is for a whole run: give its --tokens, such as 15e12")
    if budget is not None and not budget > 0:
        raise UserError(f"budget must be above 0 USD, got {budget:g}")
    sizer = Sizer(
        _problem(model, cluster, gpus, seq, global_batch, precision, expert_imbalance),
        tokens or PER,
        terms or Terms(),
        progress=progress,
    )
    if deadline is not None:
        return sizer.for_deadline(deadline)
    return sizer.cheapest() if budget is None else sizer.for_budget(budget)


def _problem(
    model: str | Model,
    cluster: str | Cluster,
    gpus: int,
    seq: int,
    global_batch: int,
    precision: Precision,
    expert_imbalance: float,
) -> Problem:
    from meshwright.planner.around import Problem

    if gpus < 1:
        raise UserError(f"gpus must be at least 1, got {gpus}")
    return Problem(_model(model), _cluster(cluster), Workload(seq, global_batch, expert_imbalance), gpus, precision)


def lint(
    *,
    model: str | Model,
    cluster: str | Cluster,
    layout: str | Layout,
    seq: int,
    global_batch: int,
    gpus: int | None = None,
    attention: str = "flash",
    grouped_gemm: bool = True,
    loss_scaling: bool = True,
    bucket_bytes: float | None = None,
    checkpoint_interval: float | None = None,
    save_seconds: float | None = None,
    failures: str | None = None,
) -> Linted:
    """Run every rule on a layout, whether it can run or not; other arguments as in `estimate`.

    `attention`, `grouped_gemm` and `loss_scaling`: of the software that runs it; the package's own engine has flash attention, grouped
    products and loss scaling. `bucket_bytes`: of gradients. `checkpoint_interval`: seconds, to be held against the best.
    """
    from meshwright.planner.bill import Terms
    from meshwright.planner.lint import lint as check  # needs NumPy
    from meshwright.planner.rules.case import Habits

    if attention not in get_args(Attention):
        raise choices(attention, get_args(Attention), "attention")
    if bucket_bytes is not None and not bucket_bytes >= 1:
        raise UserError(f"a bucket has 1 byte or more, got {bucket_bytes:g}: PyTorch's are 25e6")
    if gpus is not None and gpus < 1:
        raise UserError(f"gpus must be at least 1, got {gpus}")
    parsed = parse_layout(layout) if isinstance(layout, str) else layout
    size = None if bucket_bytes is None else int(bucket_bytes)
    habits = Habits(
        practice=Practice(attention=attention, grouped_products=grouped_gemm, bucket_bytes=size),  # type: ignore[arg-type]
        loss_scaling=loss_scaling,
        terms=Terms(failures=failures, save_seconds=save_seconds, interval_seconds=checkpoint_interval),
    )
    return check(_model(model), _cluster(cluster), Workload(seq, global_batch), parsed, gpus, habits)


def _model(model: str | Model) -> Model:
    return load_model(model) if isinstance(model, str) else model


def _cluster(cluster: str | Cluster) -> Cluster:
    return load_cluster(cluster) if isinstance(cluster, str) else cluster
