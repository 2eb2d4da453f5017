"""How long the engine's collectives take, over group sizes and message sizes. These functions run on the ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from meshwright.parallel.collectives import Group
from meshwright.parallel.ledger import Ledger
from meshwright.probe.window import over_ranks, rank_device, rounded, seconds_of, together
from meshwright.spec.cluster import CollectiveOp, CollectivePoint

Operation = CollectiveOp | Literal["p2p"]
_BATCH_SECONDS = 0.02
"""Least that is timed at once. Ranks leave a barrier some 0.1 ms apart, and milliseconds apart where they share cores: a short
call alone would be charged for that."""
_REPETITIONS = (3, 100)
"""Fewest and most timings of one point."""


def group_sizes(ranks: int) -> list[int]:
    """2, 4, 8, ... and all of them."""
    return [*(2**i for i in range(1, ranks.bit_length()) if 2**i < ranks), *([ranks] if ranks > 1 else [])]


def operations(size: int) -> tuple[Operation, ...]:
    """What is measured among `size` ranks: sends join pairs only."""
    return ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", *(("p2p",) if size == 2 else ()))


def measure_collectives(size: int, byte_sizes: Sequence[int], seconds: float) -> tuple[CollectivePoint, ...]:
    """Seconds of every operation at each size, `seconds` a point, while all disjoint groups of `size` ranks run it at once.

    That is how a mesh uses them. A time is the median over repetitions of the slowest rank. All ranks return the same.
    """
    group = _own_group(size)
    points = []
    for op in operations(size):
        for nbytes in byte_sizes:
            numel = max(1, nbytes // 4 // size) * size  # whole fp32 elements on every rank
            call = (lambda: None) if group is None else _operation(op, group, numel)
            took = _median_seconds(call, seconds) / (2 if op == "p2p" else 1)
            points.append(CollectivePoint(op=op, ranks=size, bytes=4 * numel, seconds=rounded(took)))
    return tuple(points)


def _own_group(size: int) -> Group | None:
    """The group of `size` neighbours that this rank is in; None for ranks left over, who only wait for the others."""
    world, rank, own = dist.get_world_size(), dist.get_rank(), None
    for first in range(0, world - size + 1, size):
        ranks = tuple(range(first, first + size))
        handle = dist.new_group(list(ranks))  # a call of all ranks, members or not
        if rank in ranks:
            own = Group("probe", ranks, ranks.index(rank), handle, Ledger())
    return own


def _operation(op: Operation, group: Group, numel: int) -> Callable[[], object]:
    """A call of it (p2p: of two) on fp32 buffers of `numel` elements, zeros so that sums stay finite."""
    device = rank_device()
    whole, received = (torch.zeros(numel, device=device) for _ in range(2))
    piece = whole.new_zeros(numel // group.size)
    calls: dict[Operation, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(whole),
        "all_gather": lambda: group.all_gather(whole, piece),
        "reduce_scatter": lambda: group.reduce_scatter(piece, whole),
        "all_to_all": lambda: dist.all_to_all_single(received, whole, group=group.handle),
        "p2p": lambda: _there_and_back(group, whole),
    }
    return calls[op]


def _there_and_back(group: Group, message: torch.Tensor) -> None:
    """Half of it is one message with its latency; one way only, senders would run ahead of the receivers."""
    peer = [(message, 1 - group.index)]
    for sends in (group.index == 0, group.index == 1):
        for work in group.exchange(peer, []) if sends else group.exchange([], peer):
            work.wait()


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    """Of one call on the slowest rank. Ranks must call equally often, so they agree on every time that decides how often."""
    seconds_of(call)  # the first call connects
    batch, took = 1, _slowest(call, 1)
    while took < _BATCH_SECONDS:
        batch *= 2
        took = _slowest(call, batch)
    fewest, most = _REPETITIONS
    repetitions = min(most, max(fewest, int(seconds / took)))
    return statistics.median(_slowest(call, batch) for _ in range(repetitions)) / batch


def _slowest(call: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls on the slowest rank; all start at once and learn the same."""
    together()
    return over_ranks([seconds_of(call, calls)], dist.ReduceOp.MAX)[0]
