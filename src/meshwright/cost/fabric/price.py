"""What the links make of a step's time: collectives as slow as the fullest link on their way.

The estimator prices a collective by the NICs alone, as if no leaf were oversubscribed and all NICs carried as much. Here its bytes'
part takes as much longer as the fullest link of its routes takes over the fullest NIC of the whole fabric: all groups of a kind
send at once, those of other kinds do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.routes import Loads
from meshwright.cost.fabric.spread import EVEN, Spreading
from meshwright.cost.fabric.topology import Capacities
from meshwright.cost.fabric.traffic import Kind, Traffic
from meshwright.cost.ops import Collective
from meshwright.spec.layout import Layout

Slowdowns = Mapping[Kind, float]

BEYOND_NIC = ("leaf", "core")


@dataclass(frozen=True)
class SlowedTimes(CollectiveTimes):
    """Collective times whose bytes take longer by kind."""

    slowdowns: Slowdowns = field(default_factory=dict)

    def seconds(self, c: Collective) -> float:
        whole = super().seconds(c)
        factor = max((f for kind, f in self.slowdowns.items() if kind.covers(c)), default=1.0)
        if factor == 1.0:
            return whole
        return whole + (factor - 1) * (whole - super().seconds(replace(c, bytes=1)))


def busy_seconds(loads: Loads, capacities: Capacities, spreading: Spreading = EVEN, links: int = 1) -> dict[str, float]:
    """Seconds that the fullest link of each class takes for `loads`; `links`: of one leaf to the spines, as the flows share them."""
    out = {}
    for name, capacity in capacities.items():
        seconds = loads.of[name] / capacity
        if name == "leaf":
            seconds = seconds * spreading.excess(loads.crossing, links)
        out[name] = float(seconds.max(initial=0.0))
    return out


def slowdowns(
    healthy: Traffic, now: Traffic, whole: Capacities, capacities: Capacities, spreading: Spreading, links: int
) -> dict[Kind, float]:
    """By kind of collective: how much longer its bytes take than over the fullest NIC of a healthy fabric; at least 1.

    `healthy`, `whole`: loads and capacities that the estimator takes for granted; `now`, `capacities`: those to price.
    """
    out = {}
    for kind, loads in healthy.items():
        nic = float((loads.of["nic"] / whole["nic"]).max(initial=0.0)) if "nic" in whole else 0.0
        if nic > 0:
            busy = busy_seconds(now[kind], capacities, spreading, links)
            out[kind] = max(1.0, max(busy[name] for name in ("nic", *BEYOND_NIC) if name in busy) / nic)
    return out


def step_seconds(estimator: Estimator, layout: Layout, slowed: Slowdowns) -> float:
    """The step with collectives slowed by kind."""
    if all(factor == 1.0 for factor in slowed.values()):
        return estimator.played(layout).step_time_s
    return slowed_estimator(estimator, slowed).played(layout).step_time_s


def slowed_estimator(estimator: Estimator, slowed: Slowdowns) -> Estimator:
    """The same estimator with collectives slowed by kind."""
    its = estimator.times
    times = SlowedTimes(its.cluster, its.constants, its.single_ring, slowdowns=dict(slowed))
    return Estimator(
        estimator.model, estimator.cluster, estimator.workload, estimator.practice, estimator.constants, times
    )


def scaled(capacities: Capacities, link_class: str, factor: float) -> Capacities:
    """Capacities with every link of one class at `factor` times its rate."""
    return {name: rates * np.float64(factor if name == link_class else 1.0) for name, rates in capacities.items()}
