"""Routes by rule: which links a flow from one rank to another takes.

    same domain       scale-up links, out of one accelerator and into the other
    rail-optimised    the NIC of the receiver's rail: same rail, one leaf inside a unit. From another rail first over scale-up links
                      to the accelerator beside that NIC (PXN, NCCL 2.12); without NVLink from the sender's own NIC, over a spine
    leaf-spine        the NIC beside the sender, the unit's leaf, the NIC beside the receiver
    another unit      up from the leaf to a spine and down to the other leaf; another pod: on over the core

Where a NIC is lost, its rail's traffic leaves and enters the node by the next rail, over scale-up links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.fabric.topology import LINK_CLASSES, Placement
from meshwright.spec.groups import Ranks

Bytes = NDArray[np.float64] | float


class Loads:
    """Bytes on every link: `of[link class][direction, link]`; `crossing[leaf]`: flows that go up from it."""

    def __init__(self, placement: Placement):
        t = placement.topology
        counts = {
            "scale-up": t.nodes * t.cluster.node.accelerators,
            "pcie": t.nodes * t.cluster.node.accelerators,
            "nic": t.nodes * t.rails,
            "leaf": t.leaves,
            "core": t.pods,
        }
        self.of = {name: np.zeros((2, counts[name])) for name in LINK_CLASSES}
        self.crossing = np.zeros(t.leaves, dtype=np.int64)

    def add(self, other: Loads) -> None:
        for name, bytes_ in other.of.items():
            self.of[name] += bytes_
        self.crossing += other.crossing

    def scaled(self, factor: float) -> Loads:
        """The same flows with `factor` times the bytes."""
        out = object.__new__(Loads)
        out.of = {name: bytes_ * factor for name, bytes_ in self.of.items()}
        out.crossing = self.crossing
        return out

    def put(self, link_class: str, direction: int, links: Ranks, nbytes: Bytes) -> None:
        row = self.of[link_class][direction]
        weights = np.broadcast_to(np.asarray(nbytes, dtype=np.float64), links.shape)
        row += np.bincount(links, weights, minlength=len(row))


@dataclass(frozen=True)
class Router:
    """Puts flows on the links of a placement. `lost`: (node, rail) of a NIC that is gone."""

    placement: Placement
    lost: tuple[int, int] | None = None

    def route(self, loads: Loads, source: Ranks, target: Ranks, nbytes: Bytes) -> None:
        """Add flows between ranks, `source[i]` to `target[i]`, of `nbytes` each (or `nbytes[i]`) to `loads`."""
        source, target = source.ravel(), target.ravel()
        each = np.broadcast_to(np.asarray(nbytes, dtype=np.float64), source.shape)
        near = self.placement.domain[source] == self.placement.domain[target]
        slots = self.placement.slot
        self._hop(loads, slots[source[near]], slots[target[near]], each[near])
        if not near.all():
            self._across(loads, source[~near], target[~near], each[~near])

    def _hop(self, loads: Loads, source: Ranks, target: Ranks, nbytes: NDArray[np.float64]) -> None:
        """Over scale-up links between slots; nothing where they are the same."""
        moves = source != target
        loads.put("scale-up", 0, source[moves], nbytes[moves])
        loads.put("scale-up", 1, target[moves], nbytes[moves])

    def _across(self, loads: Loads, source: Ranks, target: Ranks, nbytes: NDArray[np.float64]) -> None:
        p, t = self.placement, self.placement.topology
        from_node, to_node = p.node[source], p.node[target]
        entry = self._kept(to_node, p.rail[target])
        leave = self._kept(from_node, p.rail[target] if self._proxies else p.rail[source])
        beside_exit, beside_entry = self._beside(from_node, leave, source), self._beside(to_node, entry, target)
        self._hop(loads, p.slot[source], beside_exit, nbytes)
        self._hop(loads, beside_entry, p.slot[target], nbytes)
        for direction, slot, node, rail in ((0, beside_exit, from_node, leave), (1, beside_entry, to_node, entry)):
            loads.put("pcie", direction, slot, nbytes)
            loads.put("nic", direction, node * t.rails + rail, nbytes)
        up, down = self._leaf(from_node, leave), self._leaf(to_node, entry)
        apart = up != down
        loads.put("leaf", 0, up[apart], nbytes[apart])
        loads.put("leaf", 1, down[apart], nbytes[apart])
        loads.crossing += np.bincount(up[apart], minlength=t.leaves) * t.nics_of_rail
        from_pod, to_pod = (leaf // t.leaves_of_unit // t.pod_units for leaf in (up, down))
        away = from_pod != to_pod
        loads.put("core", 0, from_pod[away], nbytes[away])
        loads.put("core", 1, to_pod[away], nbytes[away])

    @property
    def _proxies(self) -> bool:
        """NCCL hands a flow to the accelerator on the receiver's rail where NVLink joins the node."""
        t = self.placement.topology
        links, joined = t.cluster.accelerator.scale_up, t.cluster.fabric.domain >= t.cluster.node.accelerators
        return t.is_rail_optimised and links.kind == "nvlink" and joined

    def _kept(self, node: Ranks, rail: Ranks) -> Ranks:
        if self.lost is None:
            return rail
        gone = (node == self.lost[0]) & (rail == self.lost[1])
        return np.where(gone, (rail + 1) % self.placement.topology.rails, rail)

    def _beside(self, node: Ranks, rail: Ranks, rank: Ranks) -> Ranks:
        """The slot beside the NIC of `rail`: the rank's own where that is its rail."""
        p, per_node, rails = (
            self.placement,
            self.placement.topology.cluster.node.accelerators,
            self.placement.topology.rails,
        )
        first = -(-rail * per_node // rails)
        return np.where(p.rail[rank] == rail, p.slot[rank], node * per_node + first)

    def _leaf(self, node: Ranks, rail: Ranks) -> Ranks:
        t = self.placement.topology
        unit = node // t.unit_nodes
        return unit * t.leaves_of_unit + (rail if t.is_rail_optimised else 0)
