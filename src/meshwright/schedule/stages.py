"""Which layers a pipeline stage holds."""

from __future__ import annotations

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
