"""Layouts to verify: legal, distinct, and between them every pair of modes.

A mode is something that a layout does: `dp`, `zero2`, `tp:sp`, `pp:zb-v`, `cp:ring`, `ep`, `ac:mlp`, ... Which layouts are legal is
asked of `spec/legality.py`, so a mode that gets built is drawn from then on. Dtypes are left out: in fp64 and fp32 there is none to
choose, and narrower ones round by more than a mistake would show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Any, TypeVar

from meshwright.schedule.orders import check_micro_batches
from meshwright.schedule.stages import even_counts
from meshwright.spec.errors import UserError
from meshwright.spec.layout import DENSE_AXES, PAIRING, RECOMPUTE_PARTS, SCHEDULES, Layout
from meshwright.spec.legality import refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.verify.shrink import shrink

Item = TypeVar("Item")
Features = frozenset[tuple[str, ...]]

MOST_RANKS = 8
CANDIDATES = 2000
"""Legal layouts among which a covering set is chosen."""

AXES = ("dp", "tp", "pp", "cp", "ep")
_CHUNKS = {"interleaved": 2, "zb-v": 2, "dualpipe-v": 2}
_ORDERS = (DENSE_AXES, ("pp", "dp", "cp", "tp"), ("cp", "tp", "pp", "dp"))
_DEGREES = ("dp", "tp", "pp", "cp")

UNEVEN = (-1,)
"""Stands for stages that hold unequal numbers of layers, as many as the model has: see `uneven`."""


def _built_parts() -> tuple[str, ...]:
    """What this version can recompute by itself."""
    out = []
    for part in RECOMPUTE_PARTS:
        try:
            refuse_unbuilt(Layout(recompute="selective", recompute_parts=(part,)))
        except UserError:
            continue
        out.append(part)
    return tuple(out)


PARTS = _built_parts()

MODES: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    **{f"zero{stage}": {"dp": 2, "zero": stage, "zero_shard": None} for stage in (1, 2, 3)},
    **{f"zero{stage}x": {"dp": 4, "zero": stage, "zero_shard": 2} for stage in (1, 2, 3)},
    "tp": {"tp": 2},
    "tp:sp": {"tp": 2, "sp": True, "async_tp": False},
    "tp:async": {"tp": 2, "sp": True, "async_tp": True},
    **{f"pp:{name}": {"pp": 2, "schedule": name, "chunks": _CHUNKS.get(name, 1)} for name in SCHEDULES},
    "pp:uneven": {"pp": 2, "stage_layers": UNEVEN},
    "cp:ring": {"cp": 2, "cp_ulysses": 1},
    "cp:ringxulysses": {"cp": 4, "cp_ulysses": 2},
    "cp:ulysses": {"cp": 2, "cp_ulysses": 2},
    "ep": {"dp": 2, "ep": 2},
    "ep:async": {"dp": 2, "ep": 2, "async_ep": True, "pp": 2, "schedule": PAIRING[0], "chunks": 2},
    "etp": {"tp": 2, "etp": 2},
    **{f"ac:{part}": {"recompute": "selective", "recompute_parts": (part,)} for part in PARTS},
    "ac:full": {"recompute": "full"},
    "ac:N": {"recompute_layers": 1},
    "offload:optimizer": {"offload": "optimizer"},
    "offload:all": {"dp": 2, "zero": 3, "offload": "all"},
    "offload@file": {"offload_to": "file"},
    "mb": {"micro_batch": 2},
    "order": {"order": _ORDERS[1]},
}
"""The least that a layout needs to have a mode, beside what `_completed` adds."""


def modes(layout: Layout) -> frozenset[str]:
    """What the layout does, as words; layouts with the same modes may differ in degrees."""
    out = {axis for axis in ("dp", "tp", "ep", "etp") if layout.degree(axis) > 1}
    if layout.zero:
        out.add(f"zero{layout.zero}" + ("x" if layout.zero_shard else ""))
    if layout.sp:
        out.add("tp:async" if layout.async_tp else "tp:sp")
    if layout.async_ep:
        out.add("ep:async")
    if layout.pp > 1:
        out.add(f"pp:{layout.schedule}")
    if layout.stage_layers is not None:
        out.add("pp:uneven")
    if layout.cp > 1:
        out.add("cp:" + ("ring" if layout.cp_ulysses == 1 else "ulysses" if layout.cp_ring == 1 else "ringxulysses"))
    if layout.recompute == "full":
        out.add("ac:full")
    if layout.recompute == "selective":
        out |= {f"ac:{part}" for part in layout.recompute_parts}
    if layout.recompute_layers is not None:
        out.add("ac:N")
    if layout.offload != "none":
        out.add(f"offload:{layout.offload}")
    if layout.offload_to == "file":
        out.add("offload@file")
    if layout.micro_batch > 1:
        out.add("mb")
    if layout.order != DENSE_AXES:
        out.add("order")
    return frozenset(out)


def features(layout: Layout) -> Features:
    """The pairs of modes that a layout covers, and at 8 ranks the triples of axes."""
    out = {tuple(pair) for pair in combinations(sorted(modes(layout)), 2)}
    if layout.world == MOST_RANKS:
        used = [axis for axis in AXES if layout.degree(axis) > 1]
        out |= {("triple", *three) for three in combinations(used, 3)}
    return frozenset(out)


def combined(model: Model, mode: str, other: str) -> Layout | None:
    """The smallest layout with both modes; None where one setting excludes the other. Raises UserError where they cannot go together."""
    fields = dict(MODES[mode])
    for name, value in MODES[other].items():
        if name in _DEGREES:
            fields[name] = max(value, fields.get(name, 1))
        elif name == "recompute_parts":
            fields[name] = tuple(part for part in RECOMPUTE_PARTS if part in {*value, *fields.get(name, ())})
        elif fields.setdefault(name, value) != value:
            return None
    layout = Layout(**_completed(model, fields), precision="fp64")
    return layout if {mode, other} <= modes(layout) else None


def _completed(model: Model, fields: dict[str, Any]) -> dict[str, Any]:
    """With what the fields mean nothing without: several ranks, something that is recomputed or offloaded, numbers of layers."""
    out = dict(fields)
    if not any(name in out for name in _DEGREES):
        out["dp"] = 2
    if "recompute_layers" in out:
        out.setdefault("recompute", "full")
    if "offload_to" in out:
        out.setdefault("offload", "optimizer")
    if out.get("stage_layers") == UNEVEN:
        out["stage_layers"] = uneven(model, out["pp"] * out.get("chunks", 1))
    return out


def uneven(model: Model, chunks: int, generator: random.Random | None = None) -> tuple[int, ...]:
    """Layers of each chunk, not all alike; without a generator, one layer moved from the second half to the first chunk.

    Raises UserError for chunks without layers.
    """
    counts = list(even_counts(model.layers, chunks))
    give, take, moved = chunks - 1, 0, 1
    if generator is not None:
        give, take = generator.sample(range(chunks), 2)
        moved = generator.randint(1, max(1, counts[give] // 2))
    counts[give] -= moved
    counts[take] += moved
    return tuple(counts)


def cover(items: Sequence[Item], features_of: Callable[[Item], Features]) -> list[Item]:
    """A few of the items that have every feature which any has: again and again the one with most of what is missing.

    What an item would add only shrinks, so one that still adds what it was last seen to add, and leads, is the best.
    """
    covers = [features_of(item) for item in items]
    missing = set().union(*covers)
    queue = [(-len(has), index) for index, has in enumerate(covers)]
    heapify(queue)
    chosen = []
    while missing:
        stale, index = heappop(queue)
        adds = len(covers[index] & missing)
        if -stale == adds:
            chosen.append(items[index])
            missing -= covers[index]
        else:
            heappush(queue, (-adds, index))
    return chosen


def uncovered(layouts: Iterable[Layout], candidates: Iterable[Layout]) -> set[tuple[str, ...]]:
    """What some candidate would cover and no layout does."""
    possible = set().union(*(features(layout) for layout in candidates))
    return possible - set().union(*(features(layout) for layout in layouts))


@lru_cache(maxsize=16)
def legal_layouts(model: Model, ranks: int, seed: int) -> tuple[Layout, ...]:
    """Distinct layouts of at most `ranks` ranks, in fp64, that the shrunk model can run: random ones, and for every pair of modes
    the smallest that combines them, so that none is missed by chance."""
    generator = random.Random(seed)
    out: dict[Layout, None] = {}
    for _ in range(20 * CANDIDATES):
        layout = _draw(model, generator, ranks)
        if layout is not None and layout not in out and refusal(model, layout) is None:
            out[layout] = None
            if len(out) == CANDIDATES:
                break
    for pair in combinations(MODES, 2):
        try:
            layout = combined(model, *pair)
        except UserError:
            continue
        if layout is not None and layout.world <= ranks and refusal(model, layout) is None:
            out[layout] = None
    return tuple(out)


def _draw(model: Model, generator: random.Random, ranks: int) -> Layout | None:
    pick = generator.choice
    fields: dict[str, Any] = {axis: pick((1, 1, 2, 2, 4)) for axis in _DEGREES}
    schedule = pick(SCHEDULES) if fields["pp"] > 1 else "1f1b"
    chunks = _CHUNKS.get(schedule, 1)
    zero = pick((0, 0, 1, 2, 3))
    sp = fields["tp"] > 1 and pick((True, False))
    ep = pick((1, 1, 2, 4))
    is_uneven = fields["pp"] > 1 and pick((True, False, False))
    try:
        layout = Layout(
            **fields,
            **_draw_memory_modes(generator, zero),
            ep=ep,
            async_ep=ep > 1 and schedule in PAIRING and zero < 3 and pick((True, False)),
            etp=pick((1, 1, 1, 2)),
            sp=sp,
            async_tp=sp and pick((True, False)),
            zero=zero,
            zero_shard=2 if zero and fields["dp"] == 4 and pick((True, False)) else None,
            schedule=schedule,
            chunks=chunks,
            stage_layers=uneven(model, fields["pp"] * chunks, generator) if is_uneven else None,
            cp_ulysses=pick([u for u in (1, 2, 4) if fields["cp"] % u == 0]),
            micro_batch=pick((1, 2)),
            precision="fp64",
            order=pick((_ORDERS[0], *_ORDERS)),
        )
    except UserError:
        return None
    return layout if 1 < layout.world <= ranks else None


def _draw_memory_modes(generator: random.Random, zero: int) -> dict[str, Any]:
    """Recompute and offload; legal together with ZeRO stage `zero`, but for parts that exclude each other."""
    pick = generator.choice
    fields: dict[str, Any] = {"recompute": pick(("none", "selective", "full"))}
    if fields["recompute"] == "selective":
        parts = generator.sample(PARTS, generator.randint(1, len(PARTS)))
        fields["recompute_parts"] = tuple(part for part in PARTS if part in parts)
    if fields["recompute"] != "none":
        fields["recompute_layers"] = pick((None, 1, 2))
    fields["offload"] = pick(("none", "none", "optimizer", "all" if zero == 3 else "none"))
    if fields["offload"] != "none":
        fields["offload_to"] = pick(("cpu", "file"))
    return fields


def refusal(model: Model, layout: Layout) -> str | None:
    """Why this version cannot run `layout`; None when it can."""
    try:
        refuse_unbuilt(layout)
        workload = shrink(model, layout).workload
        check_micro_batches(layout.schedule, layout.pp, workload.global_batch // (layout.dp * layout.micro_batch))
    except UserError as error:
        return str(error)
    return None
