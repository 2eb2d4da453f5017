"""How flows share the equal links of a leaf: in even parts, moved to idle ones, or hashed, so that some collide.

F flows dealt at random to P links: the fullest link gets M of them, where F / P would be even. A collective waits for its slowest
flow, so the leaf is as slow as M / (F / P) times as many bytes would make it. Q queue pairs cut each flow in Q that are dealt one by
one. P(M <= k) is exact (Levin, Annals of Statistics 9(5), 1981): with X_i Poisson of mean F / P,

    P(M <= k) = P(X_i <= k for all i | sum of X_i = F)

Checks (Monte Carlo, 20,000 draws): 32 flows on 32 links fill the fullest with 3.53 of them, so that they run at 28 %; 4 queue pairs
each make that 46 %.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import lgamma, log, sqrt

import numpy as np
from numpy.typing import NDArray

from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.fabric import load_fabric_constants

Figures = NDArray[np.float64]
Counts = NDArray[np.int64]
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

    def excess(self, flows: int, links: int) -> float:
        """The fullest link's bytes over an even link's (at least 1), where one leaf sends `flows` flows up over `links` links."""
        if self.queue_pairs is None:
            return 1 / self.share
        return max_load(flows * self.queue_pairs, links) / (flows * self.queue_pairs / links)

    def slowest_leaf(self, even: Figures, flows: Counts, links: Counts) -> float:
        """Expected seconds until the last leaf has sent its flows up over its links; `even`: those of each leaf, were all its links to
        carry as much. All that sends together waits for the worst of all leaves.
        """
        sends = flows > 0
        even, flows, links = even[sends], flows[sends], links[sends]
        if self.queue_pairs is None or not len(even):
            return float(even.max(initial=0.0)) / self.share
        kinds = Counter(zip(even.tolist(), flows.tolist(), links.tolist(), strict=True))
        steps = []
        for (seconds, dealt, over), leaves in kinds.items():
            least, at_most = load_odds(dealt * self.queue_pairs, over)
            times = seconds * over / (dealt * self.queue_pairs) * np.arange(least, least + len(at_most))
            steps.append((times, at_most**leaves))
        return _expected_latest(steps)


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


def max_load(flows: int, links: int, deals: int = 1) -> float:
    """Expected flows on the fullest of `links` links, of the worst of `deals` independent deals of `flows` flows."""
    least, at_most = load_odds(flows, links)
    return float(least + np.sum(1 - at_most**deals))


@lru_cache(maxsize=4096)
def load_odds(flows: int, links: int) -> tuple[int, Figures]:
    """The fewest flows that the fullest of `links` links can have, and the probability that it has at most so many, one more, ...

    Beyond a few thousand flows links are taken to be filled independently of each other, which is right to 1 %.
    """
    least = -(-flows // links)
    if flows > MANY_FLOWS:
        mean = flows / links
        one = np.cumsum(_poisson(np.arange(int(mean + 20 * sqrt(mean)) + 1), mean)).clip(0, 1)[least:] ** links
        return least, one[: int(np.searchsorted(one, 1 - CERTAIN)) + 1]
    odds: list[float] = []
    for most in range(least, flows + 1):
        odds.append(_at_most(flows, links, most))
        if odds[-1] > 1 - CERTAIN:
            break
    return least, np.array(odds)


def _expected_latest(steps: list[tuple[Figures, Figures]]) -> float:
    """Expected largest of independent times; of each, the values that it takes, ascending, and the odds that it is at most so large."""
    certain = max(float(times[0]) for times, _ in steps)
    steps = [(times, odds) for times, odds in steps if times[-1] > certain]
    at = np.unique(np.concatenate([[certain], *(times[times > certain] for times, _ in steps)]))
    all_done = np.ones(len(at))
    for times, odds in steps:
        place = np.searchsorted(times, at, side="right") - 1
        all_done *= np.where(place < 0, 0.0, odds[np.maximum(place, 0)])
    return float(at[0] + np.sum((1 - all_done[:-1]) * np.diff(at)))


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
