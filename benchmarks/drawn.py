"""Random legal layouts of the catalogue's models at their real size, the same for the same seed on any machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from meshwright.cost.memory import state_bytes
from meshwright.cost.program import Place, rank_program
from meshwright.schedule.orders import check_micro_batches, layout_schedule
from meshwright.schedule.stages import alike_stages, stage_chunks
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.huggingface import catalogue_models, load_model
from meshwright.spec.layout import DENSE_AXES, RECOMPUTE_PARTS, SCHEDULES, Layout, RecomputePart
from meshwright.spec.legality import check_layout, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

FEWEST_RANKS, MOST_RANKS = 8, 16_384
ROOM = 288 * 2**30
"""Bytes of the largest accelerators in the catalogue: what does not fit there is not drawn."""
MOST_LAYERS, MOST_EXPERTS = 60, 250
"""Of all that is run operator by operator, and experts in them: more would only take longer, one layer being like the next."""
CHUNKS = {"interleaved": (2, 3, 4), "zb-v": (2,), "dualpipe-v": (2,)}
RECOMPUTED: tuple[tuple[RecomputePart, ...], ...] = tuple(
    parts for n in range(1, len(RECOMPUTE_PARTS) + 1) for parts in combinations(RECOMPUTE_PARTS, n)
)
STATES: tuple[dict[str, str], ...] = (
    {}, {}, {"parameter_dtype": "fp32"}, {"gradient_dtype": "bf16"}, {"parameter_dtype": "fp32", "gradient_dtype": "bf16"},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A layout, and of which of its ranks a dry run is made: one of each kind of stage, at the same place on the other axes."""

    name: str
    model: Model
    layout: Layout
    workload: Workload
    stages: tuple[int, ...]
    ranks: tuple[int, ...]


def case(seed: int, number: int, runs: int) -> Case:
    """The `number`-th of a seed; models take turns. `runs`: of how many micro-batches alike a dry run runs all."""
    names = catalogue_models()
    name = names[number % len(names)]
    model, generator = load_model(name), random.Random(f"{seed} {number}")
    while True:
        try:
            layout = _layout(generator, model)
            seq = generator.choice((1024, 2048, 4096, 8192))
            workload = Workload(
                seq if model.rope else min(seq, model.max_positions),
                layout.dp * layout.micro_batch * _micro_batches(generator, layout),
            )
            check_layout(layout, model, workload)
            refuse_unbuilt(layout)
            check_micro_batches(layout.schedule, layout.pp, micro_batches(layout, workload))
        except UserError:
            continue
        if _is_quick(model, layout, workload, runs) and (held := _held(model, layout, workload)) and max(held) <= ROOM:
            stages = _stages(model, layout, held)
            here = {axis: generator.randrange(layout.degree(axis)) for axis in ("tp", "cp", "dp")}
            return Case(
                name, model, layout, workload, stages, tuple(Grid(layout).rank(pp=stage, **here) for stage in stages)
            )


def _layout(generator: random.Random, model: Model) -> Layout:
    pick = generator.choice
    pp, tp, cp = pick((1, 2, 4, 8, 16, 32)), pick((1, 2, 4, 8)), pick((1, 1, 1, 2, 4, 8))
    dp = pick((1, 2, 4, 8, 16, 32, 64, 128, 256))
    if not FEWEST_RANKS <= pp * tp * cp * dp <= MOST_RANKS:
        raise UserError("too few ranks, or too many")
    schedule = pick(SCHEDULES) if pp > 1 else "1f1b"
    sp, zero, ulysses = pick((True, True, False)), pick((0, 1, 1, 2, 3)), pick((1, 2, 4, 8))
    recompute = pick(("none", "none", "selective", "full"))
    precision = pick(("bf16", "bf16", "bf16", "fp16", "fp32"))
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=pick((1, 2, 4, 8, 16, 32, 64)) if model.experts else 1,
        etp=pick((1, 1, 2, 4)) if model.experts else 1,
        sp=sp and tp > 1,
        async_tp=sp and tp > 1 and pick((True, False, False)),
        zero=zero,
        zero_shard=pick((None, None, 2, 4, 8)) if zero else None,
        schedule=schedule,  # type: ignore[arg-type]
        chunks=pick(CHUNKS.get(schedule, (1,))),
        cp_ulysses=ulysses,
        micro_batch=pick((1, 1, 2, 4)),
        recompute=recompute,  # type: ignore[arg-type]
        recompute_parts=pick(RECOMPUTED) if recompute == "selective" else ("core",),
        recompute_layers=pick((None, None, 1, 2)) if recompute != "none" else None,
        precision=precision,  # type: ignore[arg-type]
        order=pick((DENSE_AXES, DENSE_AXES, ("tp", "dp", "cp", "pp"), ("tp", "cp", "pp", "dp"), ("cp", "tp", "dp", "pp"))),
        **(pick(STATES) if precision == "bf16" else {}),  # type: ignore[arg-type]
    )


def _micro_batches(generator: random.Random, layout: Layout) -> int:
    return generator.choice((1, 2, 3, 6, layout.pp, 2 * layout.pp, 3 * layout.pp))


def _is_quick(model: Model, layout: Layout, workload: Workload, runs: int) -> bool:
    m = micro_batches(layout, workload)
    entangled = layout.zero >= 2 and (layout.chunks > 1 or layout_schedule(layout, m).splits_backward)
    chunks, kinds = stage_chunks(model.layers, layout), alike_stages(model, layout)
    layers = sum(len(chunk.layers) for kind in kinds for chunk in chunks[kind[0]]) * (m if entangled else min(m, runs))
    experts = model.experts.count // layout.ep if model.experts else 0
    hops = layout.cp_ring + (layout.tp if layout.async_tp else 1)
    return layers * (2 + hops) / 4 <= MOST_LAYERS and layers * experts <= MOST_EXPERTS


def _held(model: Model, layout: Layout, workload: Workload) -> list[int]:
    """State of each stage, and what its forwards keep: most of what it holds."""
    schedule, out = layout_schedule(layout, micro_batches(layout, workload)), [0] * layout.pp
    for members in alike_stages(model, layout):
        program = rank_program(model, layout, workload, Place(members[0]))
        state = sum(state_bytes(program, layout).values())
        saved = [sum(piece.saved_bytes * repeat for piece, repeat in chunk) for chunk in program.chunks]
        for stage in members:
            out[stage] = state + schedule.peak(stage, saved)
    return out


def _stages(model: Model, layout: Layout, held: Sequence[int]) -> tuple[int, ...]:
    """Of each kind its first, and the one that holds most."""
    kinds = alike_stages(model, layout)
    return tuple(sorted({stage for kind in kinds for stage in (kind[0], max(kind, key=lambda stage: held[stage]))}))
