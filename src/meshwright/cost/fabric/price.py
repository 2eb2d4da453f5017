"""What the links make of a step's time: collectives as slow as the fullest link on their way.

The estimator prices a collective as if every member of a group had its share of the NICs and no leaf were oversubscribed. Here the
time of its bytes is at least what the fullest link of its routes takes. All groups of a kind send at once; kinds do not hold each
other up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.routes import Loads
from meshwright.cost.fabric.spread import EVEN, Spreading
from meshwright.cost.fabric.topology import Links
from meshwright.cost.fabric.traffic import Kind, Sends, Traffic
from meshwright.cost.ops import Collective
from meshwright.spec.layout import Layout

Slowdowns = Mapping[Kind, float]

NETWORK = ("pcie", "nic", "leaf", "core")
ROUNDING = 1e-5


@dataclass(frozen=True)
class SlowedTimes(CollectiveTimes):
    """Collective times whose bytes take longer by kind."""

    slowdowns: Slowdowns = field(default_factory=dict)

    def seconds(self, c: Collective) -> float:
        whole = super().seconds(c)
        factor = max((f for kind, f in self.slowdowns.items() if kind.covers(c)), default=1.0)
        return whole if factor == 1.0 else whole + (factor - 1) * (super().seconds(c._replace(bytes=2 * c.bytes)) - whole)


def busy_seconds(loads: Loads, links: Links, spreading: Spreading = EVEN) -> dict[str, float]:
    """Seconds that the fullest link of each class takes for `loads`."""
    out = {name: float((loads.of[name] / capacity).max(initial=0.0)) for name, capacity in links.capacities.items()}
    if "leaf" in out:
        up = loads.of["leaf"][0] / links.capacities["leaf"]
        out["leaf"] = max(out["leaf"], spreading.slowest_leaf(up, loads.crossing, links.uplinks))
    return out


def slowdowns(
    estimator: Estimator, sends: tuple[Sends, ...], traffic: Traffic, links: Links, spreading: Spreading
) -> dict[Kind, float]:
    """By kind of collective: how much longer its bytes take on the fullest link than the estimator has them take, where they do.

    Links reach the same share of their rate as in the estimator's own model (`plateau_share` of the network).
    """
    reached, priced = estimator.times.constants.network.plateau_share, dict[Kind, float]()
    for sent in sends:
        priced[sent.kind] = max(priced.get(sent.kind, 0.0), sent.seconds)
    out = {}
    for kind, loads in traffic.items():
        busy = busy_seconds(loads, links, spreading)
        slowest = max((busy[name] for name in NETWORK if name in busy), default=0.0) / reached
        if slowest > priced[kind] * (1 + ROUNDING) and priced[kind] > 0:
            out[kind] = slowest / priced[kind]
    return out


def step_seconds(estimator: Estimator, layout: Layout, slowed: Slowdowns) -> float:
    """The step with collectives slowed by kind."""
    return (slowed_estimator(estimator, slowed) if slowed else estimator).played(layout).step_time_s


def slowed_estimator(estimator: Estimator, slowed: Slowdowns) -> Estimator:
    """The same estimator with collectives slowed by kind."""
    its = estimator.times
    times = SlowedTimes(its.cluster, its.constants, its.single_ring, slowdowns=dict(slowed))
    return Estimator(estimator.model, estimator.cluster, estimator.workload, estimator.practice, estimator.constants, times)
