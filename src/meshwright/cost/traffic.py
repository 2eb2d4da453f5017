"""What a rank sends in a step, by axis and operation: a fold over its program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.cost.ops import Collective, Op, Under
from meshwright.cost.program import Program


@dataclass(frozen=True, slots=True)
class Sent:
    """`count` calls of `op` among `group_size` ranks of `axis`, `bytes` in all."""

    axis: str
    op: str
    group_size: int
    count: int
    bytes: int


def collectives(ops: tuple[Op, ...]) -> Iterator[Collective]:
    """The communications among `ops`."""
    for op in ops:
        if isinstance(op, Collective):
            yield op
        elif isinstance(op, Under):
            yield from (op.collective,) * op.calls


def step_collectives(program: Program, micro_batches: int) -> Iterator[tuple[Collective, int]]:
    """(collective, how often) for everything the rank sends in a step."""
    for piece, repeat in program.pieces:
        for collective in (*collectives(piece.forward), *collectives(piece.backward)):
            yield collective, repeat * micro_batches
    for collective in (*program.boundary, *program.gathers[0], *program.gathers[1], *program.scatters):
        yield collective, micro_batches
    for collective in (*program.gradient_reductions, *program.step_end):
        yield collective, 1


def step_traffic(program: Program, micro_batches: int) -> tuple[Sent, ...]:
    """Totals by axis, operation and group size, sorted; equal to the engine's ledger for the same step."""
    count: dict[tuple[str, str, int], int] = {}
    total: dict[tuple[str, str, int], int] = {}
    for collective, times in step_collectives(program, micro_batches):
        key = (collective.axis, collective.op, collective.group_size)
        count[key] = count.get(key, 0) + times
        total[key] = total.get(key, 0) + times * collective.bytes
    return tuple(Sent(*key, count[key], total[key]) for key in sorted(count))
