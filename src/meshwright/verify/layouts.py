"""Layouts to verify: legal, distinct, and between them every pair of modes.

A mode is something that a layout does: `dp`, `zero2`, `tp:sp`, `pp:zb-v`, `cp:ring`, `ep`, `ac:full`, ... Which layouts are legal is
asked of `spec/legality.py`, so a mode that gets built is drawn from then on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.errors import UserError
from meshwright.spec.layout import DENSE_AXES, SCHEDULES, Layout, Precision
from meshwright.spec.legality import refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.verify.shrink import shrink

MOST_RANKS = 8
CANDIDATES = 6000
"""Legal layouts among which a covering set is chosen."""

AXES = ("dp", "tp", "pp", "cp", "ep")
_CHUNKS = {"interleaved": 2, "zb-v": 2, "dualpipe-v": 2}
_ORDERS = (DENSE_AXES, ("pp", "dp", "cp", "tp"), ("cp", "tp", "pp", "dp"))


def modes(layout: Layout) -> frozenset[str]:
    """What the layout does, as words; layouts with the same modes may differ in degrees."""
    out = {axis for axis in ("dp", "tp", "ep", "etp") if layout.degree(axis) > 1}
    if layout.zero:
        out.add(f"zero{layout.zero}" + ("x" if layout.zero_shard else ""))
    if layout.sp:
        out.add("tp:async" if layout.async_tp else "tp:sp")
    if layout.pp > 1:
        out.add(f"pp:{layout.schedule}")
    if layout.cp > 1:
        out.add("cp:" + ("ring" if layout.cp_ulysses == 1 else "ulysses" if layout.cp_ring == 1 else "ringxulysses"))
    if layout.recompute != "none":
        out.add(f"ac:{layout.recompute}")
    if layout.micro_batch > 1:
        out.add("mb")
    if layout.order != DENSE_AXES:
        out.add("order")
    return frozenset(out)


def features(layout: Layout) -> frozenset[tuple[str, ...]]:
    """The pairs of modes that a layout covers, and at 8 ranks the triples of axes."""
    out = {tuple(pair) for pair in combinations(sorted(modes(layout)), 2)}
    if layout.world == MOST_RANKS:
        used = [axis for axis in AXES if layout.degree(axis) > 1]
        out |= {("triple", *three) for three in combinations(used, 3)}
    return frozenset(out)


def draw_layouts(
    model: Model, count: int, *, ranks: int = MOST_RANKS, seed: int = 0, precision: Precision = "fp64"
) -> list[Layout]:
    """At least a covering set, and as many more distinct legal layouts as make `count`; the same for the same seed."""
    candidates = legal_layouts(model, ranks, seed, precision)
    chosen, covered = [], set[tuple[str, ...]]()
    every = set().union(*(features(layout) for layout in candidates))
    left = list(candidates)
    while covered != every:
        best = max(left, key=lambda layout: len(features(layout) - covered))
        left.remove(best)
        chosen.append(best)
        covered |= features(best)
    return chosen + left[: max(0, count - len(chosen))]


def uncovered(layouts: Iterable[Layout], candidates: Iterable[Layout]) -> set[tuple[str, ...]]:
    """What some candidate would cover and no layout does."""
    possible = set().union(*(features(layout) for layout in candidates))
    return possible - set().union(*(features(layout) for layout in layouts))


@lru_cache(maxsize=16)
def legal_layouts(model: Model, ranks: int, seed: int, precision: Precision) -> tuple[Layout, ...]:
    """Distinct layouts of at most `ranks` ranks that the shrunk model can run, in random order."""
    generator = random.Random(seed)
    out: dict[Layout, None] = {}
    for _ in range(20 * CANDIDATES):
        layout = _draw(generator, ranks, precision)
        if layout is not None and layout not in out and _is_legal(model, layout):
            out[layout] = None
            if len(out) == CANDIDATES:
                break
    return tuple(out)


def _draw(generator: random.Random, ranks: int, precision: Precision) -> Layout | None:
    pick = generator.choice
    fields = {axis: pick((1, 1, 2, 2, 4)) for axis in ("dp", "tp", "pp", "cp")}
    schedule = pick(SCHEDULES) if fields["pp"] > 1 else "1f1b"
    zero = pick((0, 0, 1, 2, 3))
    sp = fields["tp"] > 1 and pick((True, False))
    try:
        layout = Layout(
            **fields,
            ep=pick((1, 1, 2, 4)),
            etp=pick((1, 1, 1, 2)),
            sp=sp,
            async_tp=sp and pick((True, False)),
            zero=zero,
            zero_shard=2 if zero and fields["dp"] == 4 and pick((True, False)) else None,
            schedule=schedule,
            chunks=_CHUNKS.get(schedule, 1),
            cp_ulysses=pick([u for u in (1, 2, 4) if fields["cp"] % u == 0]),
            micro_batch=pick((1, 2)),
            recompute=pick(("none", "none", "selective", "full")),
            precision=precision,
            order=pick((_ORDERS[0], *_ORDERS)),
        )
    except UserError:
        return None
    return layout if 1 < layout.world <= ranks else None


def _is_legal(model: Model, layout: Layout) -> bool:
    try:
        refuse_unbuilt(layout)
        _, workload = shrink(model, layout)
        check_micro_batches(layout.schedule, layout.pp, workload.global_batch // (layout.dp * layout.micro_batch))
    except UserError:
        return False
    return True
