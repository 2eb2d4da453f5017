"""What if: a link lost, a NIC lost, a slow accelerator, nodes in any order; how much oversubscription, which rank order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations

from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.price import slowdowns, step_seconds
from meshwright.cost.fabric.routes import Loads, Router
from meshwright.cost.fabric.spread import EVEN, Spreading
from meshwright.cost.fabric.topology import Links, Placement, place
from meshwright.cost.fabric.traffic import Kind, Sends, Traffic, step_sends, step_traffic
from meshwright.cost.steady import play_layout
from meshwright.spec.errors import UserError, choices
from meshwright.spec.layout import DENSE_AXES, Layout

WHAT_IFS = ("lose-link", "lose-nic", "slow-gpu=SHARE", "shuffle-nodes")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Wired:
    """A layout on the links of its cluster."""

    estimator: Estimator
    layout: Layout
    spreading: Spreading
    seed: int | None = None
    """Nodes in random order."""
    lost: tuple[int, int] | None = None
    """(node, rail) of a NIC that is gone."""

    @cached_property
    def placement(self) -> Placement:
        return place(self.estimator.cluster, self.layout, self.seed)

    @cached_property
    def sends(self) -> tuple[Sends, ...]:
        return step_sends(self.estimator, self.layout)

    @cached_property
    def traffic(self) -> Traffic:
        return step_traffic(self.sends, self.estimator.model, self.layout, Router(self.placement, self.lost))

    @cached_property
    def links(self) -> Links:
        return self.placement.topology.links

    @cached_property
    def total(self) -> Loads:
        loads = Loads(self.placement)
        for its in self.traffic.values():
            loads.add(its)
        return loads

    def slowed(self, links: Links | None = None, spreading: Spreading | None = None) -> dict[Kind, float]:
        """By kind of collective: how much longer its bytes take on these links than the estimator says."""
        return slowdowns(self.estimator, self.sends, self.traffic, links or self.links, spreading or self.spreading)

    def step(self, links: Links | None = None, spreading: Spreading | None = None) -> float:
        """Seconds of a step on these links (default: all of them, as flows usually spread)."""
        return step_seconds(self.estimator, self.layout, self.slowed(links, spreading))

    def busiest(self, link_class: str) -> int:
        """The link of a class that takes longest for what a step puts on it."""
        return int((self.total.of[link_class] / self.links.capacities[link_class]).max(axis=0).argmax())


@dataclass(frozen=True, slots=True)
class WhatIf:
    name: str
    what: str
    """What is lost or slow, in words."""
    step_s: float | None
    """None: the job stops."""


def what_if(wired: Wired, given: str) -> WhatIf:
    """Price one of `WHAT_IFS`. Raises UserError for any other, and where there is nothing to lose."""
    name, _, value = given.partition("=")
    known: dict[str, Callable[[Wired], WhatIf]] = {
        "lose-link": lose_link,
        "lose-nic": lose_nic,
        "shuffle-nodes": shuffle_nodes,
    }
    if name == "slow-gpu":
        return slow_gpu(wired, _share(value))
    if name not in known or value:
        raise choices(given, WHAT_IFS, "what-if")
    if not wired.placement.topology.has_network:
        raise UserError(f"{given}: cluster {wired.estimator.cluster.name} has no network; legal: slow-gpu=SHARE")
    return known[name](wired)


def lose_link(wired: Wired) -> WhatIf:
    """One link between the busiest leaf and a spine; the leaf's other links carry the same bytes."""
    t = wired.placement.topology
    if "leaf" not in wired.links.capacities:
        return WhatIf("lose-link", "no link between leaf and spine: all nodes are on one leaf", wired.step())
    leaf = wired.busiest("leaf")
    what = f"one of the {t.uplinks} uplinks of {t.link_name('leaf', 0, leaf).removesuffix(' up')}"
    if t.uplinks == 1:
        return WhatIf("lose-link", what, None)
    weaker = wired.links.weakened("leaf", leaf, (t.uplinks - 1) / t.uplinks, uplinks=1)
    return WhatIf("lose-link", what, wired.step(weaker))


def lose_nic(wired: Wired) -> WhatIf:
    """The busiest NIC: the others of its accelerator carry its bytes, or else those of the next rail (`cost/fabric/routes.py`)."""
    t, nic = wired.placement.topology, wired.busiest("nic")
    node, rail = divmod(nic, t.rails)
    name = t.link_name("nic", 0, nic).removesuffix(" out")
    if t.nics_of_rail > 1:
        cables = t.nics_of_rail
        return WhatIf(
            "lose-nic", f"one of the {cables} of {name}", wired.step(wired.links.weakened("nic", nic, 1 - 1 / cables))
        )
    if t.rails == 1:
        return WhatIf("lose-nic", f"{name}, the only one of its node", None)
    without, healthy = replace(wired, lost=(node, rail)), wired.slowed()
    now = without.slowed()
    # Moved flows can take bytes off a leaf that was the fullest; what is lost still makes nothing quicker.
    slowed = {
        kind: max(healthy.get(kind, 1.0), now.get(kind, 1.0)) for kind in dict.fromkeys((*wired.traffic, *without.traffic))
    }
    return WhatIf(
        "lose-nic",
        f"{name}; nic {(rail + 1) % t.rails} carries its bytes too",
        step_seconds(wired.estimator, wired.layout, slowed),
    )


def shuffle_nodes(wired: Wired) -> WhatIf:
    """Nodes in random order, as a scheduler that knows no topology deals them out."""
    what = f"ranks on nodes in random order (seed {SHUFFLE_SEED})"
    return WhatIf("shuffle-nodes", what, replace(wired, seed=SHUFFLE_SEED).step())


def slow_gpu(wired: Wired, share: float) -> WhatIf:
    """One accelerator computes, reads and writes at `share` of its rates: its stage is slower in one pipeline, and all others wait.

    The stage where that costs most is taken.
    """
    base, layout = wired.estimator, wired.layout
    slowed = _at_share(base, share)
    here, there = base.estimate(layout), slowed.estimate(layout)
    assert here.timeline is not None
    assert there.timeline is not None
    usual, slow = here.timeline.seconds, there.timeline.seconds
    ends = [
        play_layout(layout, here.timeline.micro_batches, [*usual[:at], slow[at], *usual[at + 1 :]], here.timeline.send).end
        for at in range(layout.pp)
    ]
    worst = max(range(layout.pp), key=ends.__getitem__)
    after = max(here.step_time_s - here.timeline.end, there.step_time_s - there.timeline.end)
    network = wired.step() - here.step_time_s
    return WhatIf("slow-gpu", f"one accelerator of stage {worst} at {share:g} of its rates", ends[worst] + after + network)


def _at_share(estimator: Estimator, share: float) -> Estimator:
    given = estimator.cluster.accelerator
    slower = given.model_copy(
        update={
            "peak_flops": {name: rate * share for name, rate in given.peak_flops.items()},
            "memory_bandwidth": given.memory_bandwidth * share,
        }
    )
    cluster = estimator.cluster.model_copy(update={"accelerator": slower})
    return Estimator(estimator.model, cluster, estimator.workload, estimator.practice, estimator.constants, estimator.times)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"slow-gpu={text}: give its share of the usual rate, above 0 and at most 1: try slow-gpu=0.8")
    return share


@dataclass(frozen=True, slots=True)
class Tolerated:
    """The largest oversubscription of a tier that slows the step by no more than a share."""

    tier: str
    oversubscription: float | None
    """None: even a single uplink is enough, or nothing crosses the tier."""
    crosses: bool


def tolerated(wired: Wired, slower: float) -> tuple[Tolerated, ...]:
    """For each tier, the others as they are, and flows spread evenly. `slower`: such as 0.01."""
    t, out = wired.placement.topology, []
    for tier in ("leaf", "core"):
        if tier not in wired.links.capacities:
            continue
        built = t.cluster.fabric.oversubscription if tier == "leaf" else t.cluster.fabric.core_oversubscription
        links = t.ports_down if tier == "leaf" else t.uplinks * t.leaves_of_unit * t.pod_units
        crosses = bool(wired.total.of[tier].any())
        limit = (1 + slower) * wired.step(wired.links.scaled(tier, built), EVEN)

        def too_slow(o: float, tier: str = tier, built: float = built, limit: float = limit) -> bool:
            return wired.step(wired.links.scaled(tier, built / o), EVEN) > limit

        largest = _largest(too_slow, float(links)) if crosses else None
        out.append(Tolerated(tier, largest, crosses))
    return tuple(out)


def _largest(too_slow: Callable[[float], bool], most: float) -> float | None:
    """The largest figure of 1 to `most` that is not too slow, to one part in a hundred; None where none is."""
    if not too_slow(most):
        return None
    low, high = 1.0, most
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if too_slow(middle) else (middle, high)
    return low


@dataclass(frozen=True, slots=True)
class Ordered:
    """A rank order and what it costs."""

    layout: Layout
    step_s: float
    leaf_bytes: float
    """That go up from leaves to spines in a step, of the whole cluster."""
    core_bytes: float
    busiest: float
    """Share of the step in which the fullest link between nodes is busy."""
    is_given: bool
    """Whether it is the order of the layout at hand."""


def rank_orders(wired: Wired) -> tuple[Ordered, ...]:
    """Every order of the axes above degree 1, the quickest first; among equals, the one that sends least over spines."""
    out = []
    for order in _orders(wired.layout):
        its = replace(wired, layout=replace(wired.layout, order=order))
        step, loads = its.step(), its.total
        busy = max(
            (float((loads.of[name] / its.links.capacities[name]).max(initial=0.0)) for name in _between_nodes(its)),
            default=0.0,
        )
        spine, core = (float(loads.of[name][0].sum()) for name in ("leaf", "core"))
        out.append(Ordered(its.layout, step, spine, core, busy / step, _is_same(order, wired.layout)))
    return tuple(sorted(out, key=lambda o: (round(o.step_s, 6), o.leaf_bytes, o.core_bytes)))


def _between_nodes(wired: Wired) -> Iterator[str]:
    yield from (name for name in ("nic", "leaf", "core") if name in wired.links.capacities)


def _orders(layout: Layout) -> Iterator[tuple[str, ...]]:
    """Axes of degree 1 keep their usual places: they change nothing."""
    active = [axis for axis in DENSE_AXES if layout.degree(axis) > 1]
    for order in permutations(active):
        its = iter(order)
        yield tuple(next(its) if axis in active else axis for axis in DENSE_AXES)


def _is_same(order: tuple[str, ...], layout: Layout) -> bool:
    active = [axis for axis in layout.order if layout.degree(axis) > 1]
    return [axis for axis in order if axis in active] == active
