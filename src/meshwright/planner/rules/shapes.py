"""Splits that do not divide: each refusal as a finding, and the nearest layout that can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import log2

from meshwright.planner.rules.case import Case, Finding, Repair
from meshwright.planner.rules.reshape import reshaped
from meshwright.planner.space import divisors
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.legality import check_layout, check_room, check_world
from meshwright.spec.workload import Workload

SOURCE = "the equations of a layout (docs/layouts.md)"
TRIED, PRICED = 4000, 4
"""Of the layouts nearest to the given one: looked at, and priced once they are found to be legal."""

REFUSALS = (
    ("ranks do not fill the layout", "a layout whose degrees do not multiply to the ranks given"),
    ("cannot run", "heads, key-value heads, MLP or vocabulary that tp does not divide, fewer layers than stages, a batch that dp and "
     "micro-batch do not divide, experts that ep does not divide, a sequence that cp or sequence parallel cannot cut"),
)  # fmt: skip


def refusals(case: Case, ranks: int) -> list[Finding]:
    """Why the layout cannot run on `ranks` ranks, with the nearest layout that can as the repair; empty for one that can."""
    said = list(_refused(case, ranks))
    if not said:
        return []
    near = nearest_legal(case, ranks)
    return [Finding("error", rule, what, None, near, None, SOURCE) for rule, what in said]


def _refused(case: Case, ranks: int) -> Iterator[tuple[str, str]]:
    layout = case.layout
    try:
        check_world(layout, ranks)
    except UserError as error:
        yield REFUSALS[0][0], str(error)
    try:
        check_room(layout, case.cluster)
    except UserError as error:
        yield REFUSALS[1][0], str(error)
    said: dict[str, None] = {}
    for part, batch in _axis_by_axis(layout, case.workload):
        try:
            check_layout(part, case.model, batch)
        except UserError as error:
            said[str(error)] = None
    try:
        case.estimator().check(layout)
        case.estimator().played(layout)  # a schedule may not run so many micro-batches
    except UserError as error:
        said[str(error)] = None
    yield from ((REFUSALS[1][0], what) for what in said)


def _axis_by_axis(layout: Layout, workload: Workload) -> Iterator[tuple[Layout, Workload]]:
    """Each axis by itself, so that one that does not divide does not hide another."""
    one = Workload(workload.seq, layout.micro_batch)
    plain = Layout(micro_batch=layout.micro_batch)
    yield replace(plain, tp=layout.tp, sp=layout.sp), one
    yield replace(plain, cp=layout.cp, cp_ulysses=layout.cp_ulysses), one
    pipeline = replace(
        plain, pp=layout.pp, chunks=layout.chunks, schedule=layout.schedule, stage_layers=layout.stage_layers
    )
    yield pipeline, one
    ranks = layout.ep * layout.etp
    yield replace(plain, dp=ranks, ep=layout.ep, etp=layout.etp), Workload(workload.seq, ranks * layout.micro_batch)
    yield replace(plain, dp=layout.dp), workload


def nearest_legal(case: Case, ranks: int) -> Repair | None:
    """Of the layouts of `ranks` ranks that differ least from the given one in the degrees of their axes, the quickest that fits."""
    found = (x for x in islice(_by_distance(case, ranks), TRIED) if case.price(x) is not None)
    priced = [(x, case.price(x)) for x in islice(found, PRICED)]
    rows = [Repair(str(x), price) for x, price in priced if price is not None]
    return min(rows, key=lambda r: (not r.price.fits, r.price.step_time_s), default=None)


def _by_distance(case: Case, ranks: int) -> Iterator[Layout]:
    given = case.layout
    axes = ("tp", "pp", "cp", "dp", "ep", "etp")
    rows = []
    for degrees in _degrees(case, ranks):
        away = [abs(log2(after / given.degree(axis))) for axis, after in zip(axes, degrees, strict=True)]
        rows.append((sum(away), sum(x > 0 for x in away), degrees))
    for _, _, degrees in sorted(rows):
        for mb in dict.fromkeys((given.micro_batch, max(1, given.micro_batch // 2), 1)):
            found = reshaped(given, micro_batch=mb, **dict(zip(axes, degrees, strict=True)))
            if found is not None:
                yield found


def _degrees(case: Case, ranks: int) -> Iterator[tuple[int, ...]]:
    experts, given = case.model.experts, case.layout
    eps = divisors(experts.count) if experts else [1]
    for tp in divisors(ranks):
        if case.model.heads % tp:
            continue
        for pp in divisors(ranks // tp):
            if pp * given.chunks > case.model.layers and pp > 1:
                continue
            for cp in divisors(ranks // tp // pp):
                dp = ranks // tp // pp // cp
                if case.workload.global_batch % dp == 0:
                    yield from ((tp, pp, cp, dp, ep, etp) for ep in eps for etp in dict.fromkeys((given.etp, 1)))
