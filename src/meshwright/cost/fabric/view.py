"""The answer of `meshwright fabric`: what a layout puts on each class of links, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from meshwright.cost.estimate import Estimator
from meshwright.cost.fabric.routes import Loads
from meshwright.cost.fabric.spread import Spreading, adaptive, hashed, usual_spreading
from meshwright.cost.fabric.topology import LINK_CLASSES, Topology
from meshwright.cost.fabric.traffic import by_axis
from meshwright.cost.fabric.whatif import Ordered, Tolerated, WhatIf, Wired, rank_orders, tolerated, what_if
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.workload import Workload

if TYPE_CHECKING:
    import networkx as nx

ALL_AXES = "all"
QUEUE_PAIRS = (1, 2, 4, 8, 16)
GRAPH_LIMIT = 2048
"""Accelerators whose links are drawn as a graph unasked."""


@dataclass(frozen=True, slots=True)
class ClassUse:
    """What one axis (or all of them) puts on one class of links in a step. Bytes of the busier direction."""

    link_class: str
    axis: str
    total_bytes: float
    mean_bytes: float
    busiest_bytes: float
    rate: float
    """Bytes/s on the busiest link, over the whole step."""
    busy: float
    """Share of the step that the busiest link needs at its full rate."""
    busiest: str
    """Its name."""


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a step puts on one link in one direction."""

    name: str
    link_class: str
    capacity: float
    bytes: dict[str, float]
    """By axis."""
    busy: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A step if flows were spread so."""

    name: str
    flows: int
    """That go up from one leaf at once, of the kind of collective that has most of them."""
    uplinks: int
    share: float
    """Of its even share of the uplinks, what the slowest of those flows gets."""
    step_s: float


@dataclass(frozen=True)
class FabricView:
    """Bytes, rates per second, seconds, as everywhere. Tables that were not asked for are empty."""

    layout: Layout
    model: str
    workload: Workload
    topology: Topology
    spreading: str
    estimated_step_s: float
    """As `meshwright estimate` prices it: every NIC at its rate."""
    step_s: float
    """On these links."""
    slowed: dict[str, float]
    """By kind of collective: how much longer the links make its bytes take."""
    uses: tuple[ClassUse, ...]
    spreads: tuple[Spread, ...]
    tolerated: tuple[Tolerated, ...]
    slower: float
    """The share of the step that a tolerated oversubscription may cost."""
    orders: tuple[Ordered, ...]
    what_ifs: tuple[WhatIf, ...]
    loads: dict[str, Loads] = field(repr=False)
    """By axis."""

    def hottest(self, between_nodes: bool = False) -> ClassUse | None:
        """The busiest link of all, or of those between nodes; None where nothing is sent."""
        inside = ("scale-up", "pcie") if between_nodes else ()
        uses = [use for use in self.uses if use.axis == ALL_AXES and use.link_class not in inside]
        return max(uses, key=lambda use: use.busy, default=None)

    def links(self, count: int | None = None) -> tuple[LinkUse, ...]:
        """Every link that carries anything, the busiest first, or the `count` busiest."""
        busiest: list[tuple[float, str, int, int]] = []
        for name, capacity in self.topology.capacities.items():
            busy = sum(loads.of[name] for loads in self.loads.values()) / capacity / self.step_s
            carrying = np.argwhere(np.asarray(busy) > 0)
            busiest += [(float(busy[d, i]), name, int(d), int(i)) for d, i in carrying]
        busiest.sort(key=lambda each: (-each[0], LINK_CLASSES.index(each[1]), each[2], each[3]))
        return tuple(self._link(name, direction, index, busy) for busy, name, direction, index in busiest[:count])

    def _link(self, name: str, direction: int, index: int, busy: float) -> LinkUse:
        bytes_ = {axis: float(loads.of[name][direction, index]) for axis, loads in self.loads.items()}
        return LinkUse(
            self.topology.link_name(name, direction, index),
            name,
            float(self.topology.capacities[name][index]),
            {axis: each for axis, each in bytes_.items() if each > 0},
            busy,
        )

    def graph(self, limit: int | None = GRAPH_LIMIT) -> nx.DiGraph:
        """The links as a networkx graph, with `capacity`, `bytes` and `busy` of each edge (`cost/fabric/graph.py`).

        Raises UserError for more than `limit` accelerators; with `limit=None` any number is drawn.
        """
        accelerators = self.topology.nodes * self.topology.cluster.node.accelerators
        if limit is not None and accelerators > limit:
            raise UserError(f"a graph of {accelerators} accelerators is large: ask for it with limit=None (limit {limit})")
        from meshwright.cost.fabric.graph import loaded_graph

        return loaded_graph(self.topology, self.loads, self.step_s)

    def as_dict(self, links: int | None = 0) -> dict[str, Any]:
        """For `--json`; with the `links` busiest links, or all of them (None)."""
        t = self.topology
        return {
            "layout": str(self.layout),
            "world": self.layout.world,
            "model": self.model,
            "cluster": t.cluster.name,
            "seq": self.workload.seq,
            "global_batch": self.workload.global_batch,
            "fabric": {
                "nodes": t.nodes,
                "unit_nodes": t.unit_nodes if t.has_network else None,
                "units": t.units if t.has_network else 0,
                "leaves": t.leaves,
                "uplinks_of_leaf": t.uplinks if t.has_network else 0,
                "pods": t.pods,
                "spines": t.spines,
                "cores": t.cores,
            },
            "spreading": self.spreading,
            "estimated_step_time_s": self.estimated_step_s,
            "step_time_s": self.step_s,
            "slowed": self.slowed,
            "link_classes": [_as_dict(use) for use in self.uses],
            "spreads": [_as_dict(spread) for spread in self.spreads],
            "tolerated": [_as_dict(each) for each in self.tolerated],
            "tolerated_slowdown": self.slower,
            "orders": [
                _as_dict(order) | {"layout": str(order.layout), "order": "-".join(order.layout.order)}
                for order in self.orders
            ],
            "what_if": [
                _as_dict(each) | {"slower": None if each.step_s is None else each.step_s / self.step_s - 1}
                for each in self.what_ifs
            ],
            "links": [_as_dict(link) for link in self.links(links)] if links != 0 else [],
        }


def view_fabric(
    estimator: Estimator,
    layout: Layout,
    *,
    what_ifs: tuple[str, ...] = (),
    orders: bool = False,
    slower: float = 0.01,
    queue_pairs: int | None = None,
) -> FabricView:
    """What `layout` puts on the links of the estimator's cluster. Raises UserError for what cannot be run or asked.

    `what_ifs`: of `whatif.WHAT_IFS`; `orders`: try every rank order; `slower`: what a tolerated oversubscription may cost;
    `queue_pairs`: of a connection, on fabrics that hash flows to links.
    """
    if not 0 < slower < 1:
        raise UserError(f"tolerated slowdown {slower:g} must lie between 0 and 1: try 0.01 for 1 %")
    wired = Wired(estimator, layout, usual_spreading(estimator.cluster, queue_pairs))
    loads, step = by_axis(wired.traffic), wired.step()
    topology = wired.placement.topology
    slowed = {f"{kind.axis} {kind.op} x{kind.group_size}": factor for kind, factor in wired.slowed().items()}
    return FabricView(
        layout=layout,
        model=estimator.model.name,
        workload=estimator.workload,
        topology=topology,
        spreading=wired.spreading.name,
        estimated_step_s=estimator.played(layout).step_time_s,
        step_s=step,
        slowed=slowed,
        uses=tuple(_uses(topology, loads, wired.total, step)),
        spreads=tuple(_spreads(wired)),
        tolerated=tolerated(wired, slower),
        slower=slower,
        orders=rank_orders(wired) if orders else (),
        what_ifs=tuple(what_if(wired, each) for each in what_ifs),
        loads=loads,
    )


def _uses(topology: Topology, loads: dict[str, Loads], total: Loads, step: float) -> list[ClassUse]:
    out = []
    for name in topology.capacities:
        for axis, its in (*loads.items(), (ALL_AXES, total)):
            if its.of[name].any():
                out.append(_use(topology, name, axis, its, step))
    return out


def _use(topology: Topology, name: str, axis: str, loads: Loads, step: float) -> ClassUse:
    bytes_, capacity = loads.of[name], topology.capacities[name]
    direction, index = np.unravel_index(int((bytes_ / capacity).argmax()), bytes_.shape)
    busiest, its = float(bytes_[direction, index]), bytes_[int(bytes_[1].sum() > bytes_[0].sum())]
    return ClassUse(
        link_class=name,
        axis=axis,
        total_bytes=float(its.sum()),
        mean_bytes=float(its.mean()),
        busiest_bytes=busiest,
        rate=busiest / step,
        busy=busiest / float(capacity[index]) / step,
        busiest=topology.link_name(name, int(direction), int(index)),
    )


def _spreads(wired: Wired) -> list[Spread]:
    """The step under every way of spreading flows over the uplinks, where any flow takes one."""
    if not any(loads.crossing.any() for loads in wired.traffic.values()):
        return []
    most = max(wired.traffic.values(), key=lambda loads: int(loads.crossing.max()) * bool(loads.of["leaf"].any()))
    flows, uplinks = int(most.crossing.max()), wired.placement.topology.uplinks
    out = []
    for spreading in (*(hashed(pairs) for pairs in QUEUE_PAIRS), adaptive()):
        excess = spreading.excess(flows, uplinks)
        out.append(
            Spread(spreading.name, flows, uplinks, _share(spreading, excess, flows, uplinks), wired.step(None, spreading))
        )
    return out


def _share(spreading: Spreading, excess: float, flows: int, uplinks: int) -> float:
    """Where there are fewer flows than links, a flow's even share is a whole link."""
    return 1 / (max(1.0, excess * min(1.0, flows / uplinks)) if spreading.queue_pairs else excess)


def _as_dict(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}
