"""What links there are between so many accelerators of a cluster, and where each rank sits.

    accelerator -- scale-up (NVLink, xGMI) -- the accelerators of its domain
    accelerator -- pcie -- nic -- leaf -- spine -- core

Rail-optimised: rail r of every node in a unit is on leaf r of that unit. Leaf-spine: all NICs of a node are on the unit's one leaf.
Builder's rules for switches of R ports, half of them down (NVIDIA DGX SuperPOD reference architectures: 127 nodes of 8 NICs have
32 leaves and 16 spines of 64 ports, 512 nodes 128, 128 and 64 cores):

    uplinks of a leaf = ports down / oversubscription
    two tiers while there are at most R leaves: spines = leaves x uplinks / R
    then pods of R / 2 leaves:                  spines = leaves x uplinks / (R / 2); cores = spines x (R / 2) / R
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from meshwright.spec.cluster import Cluster
from meshwright.spec.fabric import load_fabric_constants
from meshwright.spec.groups import Ranks
from meshwright.spec.layout import Layout

LINK_CLASSES = ("scale-up", "pcie", "nic", "leaf", "core")
"""Nearest first. leaf: its links to the spines; core: a pod's links to the core. Each link has two directions: away from the
accelerators (out, up) and towards them (in, down)."""
DIRECTIONS = ("out", "in")

Capacities = dict[str, NDArray[np.float64]]
"""Bytes/s in one direction by link class, one entry a link."""


@dataclass(frozen=True)
class Links:
    """What the links carry: as built, or with some lost."""

    capacities: Capacities
    uplinks: NDArray[np.int64]
    """Parallel links of each leaf to the spines."""

    def scaled(self, link_class: str, factor: float) -> Links:
        """Every link of one class at `factor` times its rate."""
        rates = {name: rate * factor if name == link_class else rate for name, rate in self.capacities.items()}
        return Links(rates, self.uplinks)

    def weakened(self, link_class: str, index: int, factor: float, uplinks: int = 0) -> Links:
        """One link at `factor` times its rate; of a leaf, with `uplinks` fewer parallel links."""
        rates, parallel = self.capacities[link_class].copy(), self.uplinks.copy()
        rates[index] *= factor
        if uplinks:
            parallel[index] -= uplinks
        return Links(self.capacities | {link_class: rates}, parallel)


@dataclass(frozen=True)
class Topology:
    """The links of `nodes` nodes of `cluster`."""

    cluster: Cluster
    nodes: int

    @property
    def has_network(self) -> bool:
        return self.cluster.node.nics > 0

    @property
    def is_rail_optimised(self) -> bool:
        return self.cluster.fabric.kind == "rail-optimised"

    @property
    def rails(self) -> int:
        """Accelerators of a node with NICs of their own; more NICs than accelerators are dealt out evenly."""
        return min(self.cluster.node.nics, self.cluster.node.accelerators)

    @property
    def nics_of_rail(self) -> int:
        """Cables of one rail of one node, whole ones: six NICs for four accelerators are one and a half each."""
        return self.cluster.node.nics // self.rails

    @property
    def _leaf_nics(self) -> float:
        """NICs of a node on one leaf."""
        return self.cluster.node.nics / self.leaves_of_unit

    @cached_property
    def half_switch(self) -> int:
        """NICs that half the ports of a switch hold (R / 2). Where the cluster gives units, its leaves are so filled."""
        node, unit = self.cluster.node, self.cluster.fabric.unit_nodes
        if unit is not None:
            return round(unit * self._leaf_nics)
        return int(load_fabric_constants().switch_bandwidth.value / node.nic_bandwidth) // 2

    @cached_property
    def unit_nodes(self) -> int:
        """Nodes under one set of leaves. Where the cluster does not say: as many whole domains as half a switch holds."""
        node, fabric = self.cluster.node, self.cluster.fabric
        if fabric.unit_nodes is not None:
            return fabric.unit_nodes
        domain = max(1, fabric.domain // node.accelerators)
        return max(1, int(self.half_switch / self._leaf_nics) // domain) * domain

    @property
    def ports_down(self) -> int:
        """NICs on one leaf."""
        return round(self.unit_nodes * self._leaf_nics)

    @property
    def units(self) -> int:
        return ceil(self.nodes / self.unit_nodes)

    @property
    def leaves_of_unit(self) -> int:
        return self.rails if self.is_rail_optimised else 1

    @property
    def leaves(self) -> int:
        return self.units * self.leaves_of_unit if self.has_network else 0

    @property
    def uplinks(self) -> int:
        """Links of one leaf to the spines, each as fast as a NIC's."""
        return max(1, round(self.ports_down / self.cluster.fabric.oversubscription))

    @cached_property
    def pod_units(self) -> int:
        """Units whose leaves share spines."""
        if self.cluster.fabric.pod_nodes is not None:
            return self.cluster.fabric.pod_nodes // self.unit_nodes
        return self.units if self.leaves <= 2 * self.half_switch else max(1, self.half_switch // self.leaves_of_unit)

    @property
    def pods(self) -> int:
        return ceil(self.units / self.pod_units) if self.has_network else 0

    @property
    def spines(self) -> int:
        """Of all pods."""
        up = self.leaves * self.uplinks
        return ceil(up / (self.half_switch if self.pods > 1 else 2 * self.half_switch)) if self.has_network else 0

    @property
    def cores(self) -> int:
        return ceil(self.spines / 2 / self.cluster.fabric.core_oversubscription) if self.pods > 1 else 0

    @cached_property
    def capacities(self) -> Capacities:
        """Of every link, in one direction. Leaf and core: of all parallel links of the leaf, of the pod, together."""
        node, links, fabric = self.cluster.node, self.cluster.accelerator.scale_up, self.cluster.fabric
        accelerators = self.nodes * node.accelerators
        out = {"scale-up": np.full(accelerators, links.bandwidth)}
        if not self.has_network:
            return out
        if self.cluster.accelerator.host_bandwidth is not None:
            out["pcie"] = np.full(accelerators, self.cluster.accelerator.host_bandwidth)
        out["nic"] = np.full(self.nodes * self.rails, node.nics / self.rails * node.nic_bandwidth)
        leaf = self.ports_down * node.nic_bandwidth / fabric.oversubscription
        if self.leaves > 1:
            out["leaf"] = np.full(self.leaves, leaf)
        if self.pods > 1:
            pod = leaf * self.leaves_of_unit * self.pod_units / fabric.core_oversubscription
            out["core"] = np.full(self.pods, pod)
        return out

    @property
    def links(self) -> Links:
        """As built, nothing lost."""
        return Links(self.capacities, np.full(self.leaves, self.uplinks if self.has_network else 0))

    def link_name(self, link_class: str, direction: int, index: int) -> str:
        """What a person calls the link: "node 3 gpu 2 NVLink4 out", "unit 0 leaf 5 up"."""
        node = self.cluster.node
        if link_class == "scale-up":
            host, local = divmod(index, node.accelerators)
            return f"node {host} gpu {local} {self.cluster.accelerator.scale_up.name} {DIRECTIONS[direction]}"
        if link_class == "pcie":
            host, local = divmod(index, node.accelerators)
            return f"node {host} gpu {local} PCIe {DIRECTIONS[direction]}"
        if link_class == "nic":
            host, rail = divmod(index, self.rails)
            return f"node {host} nic {rail} {DIRECTIONS[direction]}"
        way = ("up", "down")[direction]
        if link_class == "leaf":
            unit, rail = divmod(index, self.leaves_of_unit)
            return f"unit {unit} leaf {rail} {way}"
        return f"pod {index} core {way}"


@dataclass(frozen=True)
class Placement:
    """Where each rank sits: `slot[rank]` numbers the accelerators node by node."""

    topology: Topology
    slot: Ranks

    @cached_property
    def domain(self) -> Ranks:
        """The scale-up domain of each rank."""
        return self.slot // self.topology.cluster.fabric.domain

    @cached_property
    def node(self) -> Ranks:
        return self.slot // self.topology.cluster.node.accelerators

    @cached_property
    def rail(self) -> Ranks:
        """The rail whose NICs are nearest to each rank's accelerator."""
        node = self.topology.cluster.node
        return self.slot % node.accelerators * self.topology.rails // node.accelerators


def place(cluster: Cluster, layout: Layout, seed: int | None = None) -> Placement:
    """Ranks in order, node after node; with `seed`, on nodes (or domains, where they are larger) in random order.

    Domains are filled with whole groups, as in `Cluster.tier`: tp16 takes 64 of an NVL72's 72 accelerators.
    """
    domain, node = cluster.fabric.domain, cluster.node.accelerators
    blocks = [prod(layout.degree(axis) for axis in layout.order[: at + 1]) for at in range(len(layout.order))]
    block = max((size for size in blocks if size <= domain), default=1)
    used = domain // block * block if layout.world > domain else domain
    at, offset = np.divmod(np.arange(layout.world), used)
    if seed is not None:
        whole = max(domain, node) // domain
        shuffled = np.random.default_rng(seed).permutation(int(at[-1]) // whole + 1)
        at = shuffled[at // whole] * whole + at % whole
    slot = at * domain + offset
    return Placement(Topology(cluster, int(slot.max()) // node + 1), slot)
