"""A collective as flows between ranks, by its algorithm. Bytes as in nccl-tests (doc/PERFORMANCE.md).

    ring            every rank to the next: 2 (n-1)/n of the bytes for all-reduce, (n-1)/n for all-gather and reduce-scatter
    summed in switch every rank out and in 1 + 1/n of the bytes: read for the sum, and the sum of its part to all (NVLS)
    tree             2 (N-1)/N of a rank's part of the bytes to its like in another of N domains; in each, all bytes up and down a
                     chain of its g ranks, or summed in the switch. PAT sends what a ring does
    pairwise        every rank to every other, 1/n of the bytes: all-to-all
    send            every rank to the next of its ring (context parallel, async tensor parallel)

A ring over several domains runs in channels: each enters a domain at another member, so that all members' NICs share the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from meshwright.cost.collectives import WIRE_FACTOR, Algorithm
from meshwright.cost.fabric.routes import Loads, Router
from meshwright.spec.groups import Ranks


def load_collective(router: Router, op: str, algorithm: Algorithm, groups: Ranks, nbytes: float) -> Loads:
    """What one call of `op` with `nbytes`, in each row of `groups` at once, puts on the links."""
    loads, n = Loads(router.placement), groups.shape[1]
    if n == 1:
        return loads
    if op == "send":
        router.route(loads, groups, np.roll(groups, -1, axis=1), nbytes)
    elif op == "all_to_all":
        for shift in range(1, n):
            router.route(loads, groups, np.roll(groups, -shift, axis=1), nbytes / n)
    elif algorithm == "in-switch":
        _put_inside(router, loads, groups, nbytes * (1 + 1 / n))
    elif algorithm in ("tree", "switch-tree") and (rails := _rails(groups, router.placement.domain)) is not None:
        nodes, here = rails.shape[1], n // rails.shape[1]
        router.route(loads, rails, np.roll(rails, -1, axis=1), 2 * (nodes - 1) / nodes * nbytes / here)
        if here > 1:
            _put_inside(
                router, loads, groups, nbytes * (1 + 1 / here if algorithm == "switch-tree" else 2 * (here - 1) / here)
            )
    else:
        each = nbytes * WIRE_FACTOR[op] * (n - 1) / n
        channels = list(_channels(groups, router.placement.domain))
        for ring in channels:
            router.route(loads, ring, np.roll(ring, -1, axis=1), each / len(channels))
    return loads


def _put_inside(router: Router, loads: Loads, groups: Ranks, nbytes: float) -> None:
    """Out of every rank and into it, over the links of its domain."""
    slots = router.placement.slot[groups.ravel()]
    for direction in (0, 1):
        loads.put("scale-up", direction, slots, nbytes)


def _rails(groups: Ranks, domain: Ranks) -> Ranks | None:
    """The members at the same place of each domain, as groups of their own; None where domains do not hold equally many."""
    here = int((domain[groups[0]] == domain[groups[0, 0]]).sum())
    if groups.shape[1] % here:
        return None
    by_domain = groups.reshape(len(groups), -1, here)
    its = domain[by_domain]
    if (its != its[:, :, :1]).any() or (np.diff(its[:, :, 0], axis=1) == 0).any():
        return None
    return by_domain.transpose(0, 2, 1).reshape(-1, by_domain.shape[1])


def _channels(groups: Ranks, domain: Ranks) -> Iterator[Ranks]:
    """Rings over the members of each row, domain after domain; in each, the members of a domain start at another one."""
    n = groups.shape[1]
    at = np.arange(n)
    is_first = np.ones(groups.shape, dtype=bool)
    is_first[:, 1:] = np.diff(domain[groups], axis=1) != 0
    first = np.maximum.accumulate(np.where(is_first, at, 0), axis=1)
    is_last = np.ones(groups.shape, dtype=bool)
    is_last[:, :-1] = is_first[:, 1:]
    last = np.minimum.accumulate(np.where(is_last, at, n)[:, ::-1], axis=1)[:, ::-1]
    size = last - first + 1
    if int(size.min()) == n:  # all in one domain: its links carry any order alike
        yield groups
        return
    for channel in range(int(size.max())):
        yield np.take_along_axis(groups, first + (at - first + channel) % size, axis=1)
