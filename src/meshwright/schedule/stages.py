"""Which layers a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.spec.errors import UserError


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Consecutive layers of each stage. Left-over layers go to the stages before the last, from the back:

    the last stage also carries the head, and the first ones hold the most micro-batches in flight.
    """
    if stages > layers:
        raise UserError(f"{stages} pipeline stages for {layers} layers: every stage needs one, so pp is at most {layers}")
    counts = [layers // stages] * stages
    for stage in range(layers % stages):
        counts[stages - 2 - stage] += 1
    out, start = [], 0
    for count in counts:
        out.append(range(start, start + count))
        start += count
    return tuple(out)


def distinct_stages(layers: int, stages: int, windows: Sequence[int | None] = ()) -> list[tuple[int, int]]:
    """(earliest stage, how many) of stages that hold the same: the first, the last, and those between by layer count.

    `windows`: of each layer's attention, where they differ.
    """
    held = stage_layers(layers, stages)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for stage, its in enumerate(held):
        kinds.setdefault((stage == 0, stage == stages - 1, len(its), *windows[its.start : its.stop]), []).append(stage)
    return [(members[0], len(members)) for members in kinds.values()]
