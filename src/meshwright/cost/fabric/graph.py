"""The links as a networkx graph: accelerators, scale-up domains, NICs, leaves, spines and cores, with what a step puts on each edge.

Nodes have `kind`; edges, one in each direction, have `link_class`, `capacity` (bytes/s), `bytes` and `busy` (share of the step).
Links of a leaf to the spines of its pod carry even parts, as do those of a pod's spines to the cores.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx

from meshwright.cost.fabric.routes import Loads
from meshwright.cost.fabric.topology import Topology


def loaded_graph(topology: Topology, loads: Mapping[str, Loads], step: float) -> nx.DiGraph:
    """`loads`: bytes of a step of `step` seconds, by axis."""
    graph = _Builder(topology, loads, step)
    graph.add_scale_up()
    if topology.has_network:
        graph.add_nics()
    if topology.leaves > 1:
        graph.add_spines()
    if topology.pods > 1:
        graph.add_cores()
    return graph.graph


class _Builder:
    def __init__(self, topology: Topology, loads: Mapping[str, Loads], step: float):
        self.topology, self.loads, self.step = topology, loads, step
        self.graph = nx.DiGraph()

    def add_scale_up(self) -> None:
        node, fabric = self.topology.cluster.node, self.topology.cluster.fabric
        for slot in range(self.topology.nodes * node.accelerators):
            self._add(_gpu(self.topology, slot), f"domain {slot // fabric.domain}", "scale-up", slot)
            self.graph.nodes[_gpu(self.topology, slot)]["kind"] = "accelerator"
            self.graph.nodes[f"domain {slot // fabric.domain}"]["kind"] = "domain"

    def add_nics(self) -> None:
        t, node = self.topology, self.topology.cluster.node
        for slot in range(t.nodes * node.accelerators):
            host, local = divmod(slot, node.accelerators)
            nic = f"node {host} nic {local * t.rails // node.accelerators}"
            self._add(_gpu(t, slot), nic, "pcie", slot, other="nic")
        for at in range(t.nodes * t.rails):
            host, rail = divmod(at, t.rails)
            nic = f"node {host} nic {rail}"
            leaf = host // t.unit_nodes * t.leaves_of_unit + (rail if t.is_rail_optimised else 0)
            self._add(nic, _leaf(t, leaf), "nic", at)
            self.graph.nodes[nic]["kind"], self.graph.nodes[_leaf(t, leaf)]["kind"] = "nic", "leaf"

    def add_spines(self) -> None:
        for leaf in range(self.topology.leaves):
            spines = self._spines(leaf // self.topology.leaves_of_unit // self.topology.pod_units)
            for spine in spines:
                self._add(_leaf(self.topology, leaf), spine, "leaf", leaf, parts=len(spines))
                self.graph.nodes[spine]["kind"] = "spine"

    def add_cores(self) -> None:
        cores = [f"core {at}" for at in range(self.topology.cores)]
        for pod in range(self.topology.pods):
            spines = self._spines(pod)
            for spine in spines:
                for core in cores:
                    self._add(spine, core, "core", pod, parts=len(spines) * len(cores))
                    self.graph.nodes[core]["kind"] = "core"

    def _spines(self, pod: int) -> list[str]:
        each = -(-self.topology.spines // self.topology.pods)
        return [f"pod {pod} spine {at}" for at in range(each)]

    def _add(self, here: str, there: str, link_class: str, index: int, parts: int = 1, other: str = "") -> None:
        """Both directions of a link. `other`: whose rate it has where its own is not known."""
        capacities = self.topology.capacities
        # An accelerator's NIC is its only way out, so that an unknown rate of the way there is taken to hold nothing up.
        rates = capacities.get(link_class)
        capacity = float(rates[index] if rates is not None else capacities[other][0]) / parts
        for direction, ends in ((0, (here, there)), (1, (there, here))):
            nbytes = float(sum(loads.of[link_class][direction, index] for loads in self.loads.values())) / parts
            busy = nbytes / capacity / self.step
            self.graph.add_edge(*ends, link_class=link_class, capacity=capacity, bytes=nbytes, busy=busy)


def _gpu(topology: Topology, slot: int) -> str:
    host, local = divmod(slot, topology.cluster.node.accelerators)
    return f"node {host} gpu {local}"


def _leaf(topology: Topology, leaf: int) -> str:
    unit, rail = divmod(leaf, topology.leaves_of_unit)
    return f"unit {unit} leaf {rail}"


def graphml(graph: nx.DiGraph) -> str:
    """As XML that graph tools read."""
    return "\n".join(nx.generate_graphml(graph)) + "\n"
