"""How flows share the equal links of a leaf: in even parts, moved to idle ones, or hashed, so that some collide.

F flows dealt at random to P links: the fullest link gets M of them, where F / P would be even. A collective waits for its slowest
flow, so the leaf is as slow as M / (F / P) times as many bytes would make it. Q queue pairs cut each flow in Q that are dealt one by
one. P(M <= k) is exact (Levin, Annals of Statistics 9(5), 1981): with X_i Poisson of mean F / P,

    P(M <= k) = P(X_i <= k for all i | sum of X_i = F)

Checks: 32 flows on 32 links fill the fullest with 3.53 of them, so that they run at 28 %; 4 queue pairs each make that 46 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lgamma, log, sqrt

import numpy as np
from numpy.typing import NDArray

from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.fabric import load_fabric_constants

Spreads = NDArray[np.float64]
CERTAIN = 1e-9
MANY_FLOWS = 4096


@dataclass(frozen=True, slots=True)
class Spreading:
    """How a fabric chooses among equal links."""

    name: str
    queue_pairs: int | None = None
    """Of a hashed connection; None where flows are not hashed."""
    share: float = 1.0
    """Of the links' rate that is reached where they are not."""

    def excess(self, flows: NDArray[np.int64], links: NDArray[np.int64]) -> Spreads:
        """For each leaf with so many flows going up over so many links: the fullest link's bytes over an even link's (at least 1).

        A collective waits for the worst of all leaves that send up, so each is dealt as often as there are such leaves.
        """
        if self.queue_pairs is None:
            return np.where(flows > 0, 1 / self.share, 1.0)
        out, leaves = np.ones(len(flows)), int((flows > 0).sum())
        for count, over in {(int(f), int(p)) for f, p in zip(flows, links, strict=True) if f > 0}:
            dealt = count * self.queue_pairs
            out[(flows == count) & (links == over)] = max_load(dealt, over, leaves) / (dealt / over)
        return out


EVEN = Spreading("even")


def adaptive() -> Spreading:
    return Spreading("adaptive routing", share=load_fabric_constants().spraying_share.value)


def hashed(queue_pairs: int) -> Spreading:
    return Spreading(f"hashed, {queue_pairs} queue pair{'s' if queue_pairs > 1 else ''}", queue_pairs)


def usual_spreading(cluster: Cluster, queue_pairs: int | None = None) -> Spreading:
    """How the cluster's transport spreads flows. Raises UserError for queue pairs where they would change nothing."""
    constants, transport = load_fabric_constants(), cluster.fabric.transport
    if queue_pairs is not None and queue_pairs < 1:
        raise UserError(f"queue pairs must be at least 1, got {queue_pairs}")
    if transport != "none" and constants.spreading[transport] == "hashed":
        return hashed(queue_pairs or constants.queue_pairs.value)
    if queue_pairs is not None:
        raise UserError(
            f"{queue_pairs} queue pairs would change nothing on {cluster.name}: {transport} does not hash flows; leave them out"
        )
    return EVEN if transport == "none" else adaptive()


@lru_cache(maxsize=4096)
def max_load(flows: int, links: int, draws: int = 1) -> float:
    """Expected flows on the fullest of `links` links, of the worst of `draws` independent deals of `flows` flows.

    Beyond a few thousand flows links are taken to be filled independently of each other, which is right to 1 %.
    """
    least = -(-flows // links)
    if flows > MANY_FLOWS:
        mean = flows / links
        counts = np.arange(int(mean + 20 * sqrt(mean)) + 1)
        at_most = np.cumsum(_poisson(counts, mean)).clip(0, 1)
        return float(least + np.sum(1 - at_most[least:] ** (links * draws)))
    expected = float(least)
    for most in range(least, flows):
        missing = 1 - _at_most(flows, links, most) ** draws
        expected += missing
        if missing < CERTAIN:
            break
    return expected


def _at_most(flows: int, links: int, most: int) -> float:
    """Probability that no link gets more than `most` flows."""
    if links == 1:
        return float(most >= flows)
    one = _poisson(np.arange(min(most, flows) + 1), flows / links)
    # Sums beyond the length wrap around, so it reaches far into the tail of a sum whose mean is `flows`.
    length = 1 << (4 * flows + 64).bit_length()
    together = np.fft.irfft(np.fft.rfft(one, length) ** links, length)[flows]
    whole = np.exp(flows * log(flows) - flows - lgamma(flows + 1))
    return float(min(1.0, max(0.0, together / whole)))


def _poisson(counts: NDArray[np.int64], mean: float) -> NDArray[np.float64]:
    """Probability of each of `counts`, which run from 0."""
    log_factorial = np.cumsum(np.log(np.maximum(counts, 1)))
    return np.asarray(np.exp(counts * log(mean) - mean - log_factorial))
