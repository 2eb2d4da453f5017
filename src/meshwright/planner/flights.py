"""How many chunks a stage of each schedule holds at its fullest, in closed form and of many layouts at once: what
`Schedule.in_flight`, `held` and `deferred` count on the lists. `m`: micro-batches; all give [stages, n]."""

from __future__ import annotations

import numpy as np

from meshwright.planner.arrays import Ints
from meshwright.planner.space import Pipeline


def in_flight(p: Pipeline, m: Ints) -> Ints:
    """Whose input's gradient is still to come. What the second half of a split backward needs of others may be next to nothing."""
    stage = np.arange(p.pp)[:, None]
    if p.schedule == "gpipe":
        return np.asarray(np.broadcast_to(m, (p.pp, len(m))))
    if p.schedule == "interleaved":
        return np.minimum(m * p.chunks, 2 * (p.pp - 1 - stage) + (p.chunks - 1) * p.pp + 1)
    if p.schedule == "zb-v":
        return np.asarray(np.minimum(np.minimum(2 * m, m + 1 + stage), 2 * p.pp))
    if p.schedule == "dualpipe-v":
        return np.full((p.pp, len(m)), 2 * p.pp + 1)
    return np.minimum(m, p.pp - stage)


def held(p: Pipeline, m: Ints) -> Ints:
    """Of which anything is there, be it for the weights' half of a backward; of ZB-V with fewer micro-batches than stages no more than
    that."""
    if p.schedule == "zb-h1":
        return np.asarray(np.broadcast_to(np.minimum(m, p.pp), (p.pp, len(m))))
    return in_flight(p, m)


def deferred(p: Pipeline, m: Ints) -> Ints:
    """Whose weights' half is put off; of ZB-V with fewer micro-batches than stages no more than that."""
    stage = np.arange(p.pp)[:, None]
    if p.schedule not in ("zb-h1", "zb-v", "dualpipe-v"):
        return np.zeros((p.pp, len(m)), dtype=np.int64)
    fewest = np.minimum(m, stage + 1)
    return np.where(m >= p.pp, 2 * stage + 1, fewest) if p.schedule == "zb-v" else fewest


def by_chunks(p: Pipeline, m: Ints) -> Ints:
    """[stages, chunks, n]: of interleaved stages, in flight at the end of the warm-up, whose forwards take the chunks in rounds of one a
    stage."""
    rounds, left = np.divmod(in_flight(p, m), p.pp * p.chunks)
    return rounds[:, None] * p.pp + np.clip(left[:, None] - p.pp * np.arange(p.chunks)[:, None], 0, p.pp)
