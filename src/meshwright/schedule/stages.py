"""Which layers a pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Seat, Shard, Split, chunk_shards

FOLDED = ("zb-v", "dualpipe-v")
"""Schedules whose second chunk runs back through the stages, so that the first stage holds both ends of the model."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive layers; the chunk at the first place also holds the embedding, the one at the last place the head."""

    place: int
    layers: range
    first: bool
    last: bool


@lru_cache(maxsize=1024)
def placement(schedule: str, stages: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """`placement[stage][chunk]`: the chunk's place in the model, from 0 to stages * chunks - 1."""
    if schedule in FOLDED:
        return tuple((stage, 2 * stages - 1 - stage) for stage in range(stages))
    return tuple(tuple(chunk * stages + stage for chunk in range(chunks)) for stage in range(stages))


def stage_chunks(layers: int, layout: Layout) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of each stage."""
    return _stage_chunks(layers, layout.schedule, layout.pp, layout.chunks, layout.stage_layers)


@lru_cache(maxsize=1024)
def _stage_chunks(
    layers: int, schedule: str, stages: int, chunks: int, counts: tuple[int, ...] | None
) -> tuple[tuple[Chunk, ...], ...]:
    held = consecutive(counts or even_counts(layers, stages * chunks))
    last = len(held) - 1
    return tuple(
        tuple(Chunk(place, held[place], place == 0, place == last) for place in places)
        for places in placement(schedule, stages, chunks)
    )


def rank_shards(model: Model, layout: Layout, stage: int, seat: Seat) -> tuple[Shard, ...]:
    """Every shard of a rank, in model order; a tied embedding whose two ends share the rank is there once."""
    split = Split.of(layout)
    chunks = sorted(stage_chunks(model.layers, layout)[stage], key=lambda chunk: chunk.place)
    return tuple(s for c in chunks for s in chunk_shards(model, split, seat, c.layers, c.first, c.last))


def first_rank(layout: Layout, stage: int) -> int:
    """The rank of `stage` that is first on all other axes. Raises UserError for a stage that there is not."""
    if not 0 <= stage < layout.pp:
        raise UserError(f"stage {stage} is not one of the {layout.pp} of '{layout}': try 0 to {layout.pp - 1}")
    return Grid(layout).rank(pp=stage)


def even_counts(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage. Left-over layers go to the stages before the last, from the back:

    the last stage also carries the head, and the first ones hold the most micro-batches in flight.
    """
    if stages > layers:
        raise UserError(f"{stages} pipeline stages for {layers} layers: every stage needs one, so pp is at most {layers}")
    counts = [layers // stages] * stages
    for stage in range(layers % stages):
        counts[stages - 2 - stage] += 1
    return tuple(counts)


def consecutive(counts: tuple[int, ...]) -> tuple[range, ...]:
    """The layers of stages that hold so many each."""
    ends = tuple(accumulate(counts))
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def alike_stages(model: Model, layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The stages in groups that hold the same kinds of layers in the same chunks and have as many neighbours."""
    return _alike_stages(model, layout.schedule, layout.pp, layout.chunks, layout.stage_layers)


@lru_cache(maxsize=1024)
def _alike_stages(
    model: Model, schedule: str, stages: int, chunks_each: int, counts: tuple[int, ...] | None
) -> tuple[tuple[int, ...], ...]:
    kinds: dict[tuple[object, ...], list[int]] = {}
    for stage, chunks in enumerate(_stage_chunks(model.layers, schedule, stages, chunks_each, counts)):
        key = tuple((c.first, c.last, *((model.window(i), model.is_moe(i)) for i in c.layers)) for c in chunks)
        is_turn = schedule in FOLDED and stage == stages - 1
        kinds.setdefault((is_turn, *key), []).append(stage)
    return tuple(tuple(members) for members in kinds.values())
