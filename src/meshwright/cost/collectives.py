"""Seconds of one collective on the links that carry it: measured points where there are any, latency + bytes / rate otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import log2
from typing import Literal

from meshwright.cost.kernels import interpolate
from meshwright.cost.ops import Collective
from meshwright.spec.cluster import Cluster, LinkTier
from meshwright.spec.collectives import CollectiveConstants, RingProtocol
from meshwright.spec.errors import UserError

WIRE_FACTOR = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Times (n-1)/n of the bytes: what a ring puts through each link (nccl-tests, doc/PERFORMANCE.md)."""


Algorithm = Literal["ring", "in-switch", "tree", "switch-tree", "pat"]

Lines = tuple[tuple[float, float], ...]
"""(seconds, seconds a byte) of each way to do a collective."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a collective as a function of its bytes: those of the quickest of `lines`, at least `floor`."""

    lines: Lines
    floor: float = 0.0

    def seconds(self, nbytes: int) -> float:
        return max(self.floor, min([latency + slope * nbytes for latency, slope in self.lines]))


@dataclass(frozen=True)
class CollectiveTimes:
    """Prices collectives on `cluster`."""

    cluster: Cluster
    constants: CollectiveConstants
    single_ring: bool = False
    """Of data-parallel groups: see `Practice.single_ring`."""
    _curves: dict[tuple[str, str, int, int], Curve | None] = field(default_factory=dict, repr=False, compare=False)

    def seconds(self, c: Collective) -> float:
        """Of one call."""
        curve = self.curve(c)
        return curve.seconds(c.bytes) if curve else self._measured(c)

    def curve(self, c: Collective) -> Curve | None:
        """Of collectives like `c` whatever their bytes; None where they are interpolated between measurements."""
        key = (c.axis, c.op, c.group_size, c.stride)
        if key not in self._curves:
            self._curves[key] = None if self._points_of(c) else self._formula(c)
        return self._curves[key]

    def _formula(self, c: Collective) -> Curve:
        constants = self.constants.link(self.cluster, self.link(c))
        if c.op == "send":
            return Curve(((constants.p2p_latency, 1 / (constants.p2p_share * self._line_rate(c))),))
        floor = constants.floors.get(c.op, 0.0)
        if c.op == "all_to_all":
            return Curve(self._all_to_all(c), floor)
        return Curve(_lowest(line for lines in self._ways(c).values() for line in lines), floor)

    def algorithm(self, c: Collective) -> Algorithm:
        """The one that an all-gather, reduce-scatter or all-reduce takes least time by; other operations have none to choose."""
        if c.op not in WIRE_FACTOR:
            return "ring"
        ways = self._ways(c)
        return min((way for way, lines in ways.items() if lines), key=lambda way: Curve(ways[way]).seconds(c.bytes))

    def _ways(self, c: Collective) -> dict[Algorithm, Lines]:
        """Of an all-gather, reduce-scatter or all-reduce; without lines where it cannot be done so."""
        return {
            "ring": self._rings(c),
            "in-switch": self._in_switch(c),
            "tree": self._tree(c),
            "switch-tree": self._switch_tree(c),
            "pat": self._pat(c),
        }

    def _rings(self, c: Collective) -> Lines:
        protocols = self.constants.link(self.cluster, self.link(c)).protocols
        return self._protocols(c, protocols, WIRE_FACTOR[c.op] * (c.group_size - 1), self._wire(c) / self._ring_rate(c))

    def _wire(self, c: Collective) -> float:
        """Of a byte: what a ring puts through each link, and what a rank's copy of its own part amounts to."""
        copied = self.constants.link(self.cluster, self.link(c)).copy_share
        return (WIRE_FACTOR[c.op] * (c.group_size - 1) + copied) / c.group_size

    def _in_switch(self, c: Collective) -> Lines:
        """Of an all-reduce that the switches sum; empty where they cannot, or nothing is gained."""
        constants = self.constants.link(self.cluster, self.link(c)).in_switch
        if c.op != "all_reduce" or constants is None or not self.cluster.accelerator.scale_up.sums_in_switch:
            return ()
        gain = constants.gain_of(c.group_size)
        base = constants.base_latency * self._latency_share(c)
        return ((base, self._wire(c) / (gain * self._ring_rate(c))),) if gain > 1 else ()

    def _tree(self, c: Collective) -> Lines:
        """Of an all-reduce over several nodes, whose latency grows with their logarithm: up and down a tree of nodes, in each of which
        the ranks are a chain."""
        tree, here, nodes = self.constants.link(self.cluster, self.link(c)).tree, self._members(c), self._nodes(c)
        if tree is None or c.op != "all_reduce":
            return ()
        inside = 2.0 / self._inside_rate(c) if here > 1 else 0.0
        slope = max(inside, (1.0 if nodes == 2 else 2.0) / self._outside_rate(c))
        return tuple(
            (p.base_latency + 2 * ((here - 1) * tree.inside[name] + log2(nodes) * p.hop_latency), slope / p.bandwidth_share)
            for name, p in tree.protocols.items()
        )

    def _switch_tree(self, c: Collective) -> Lines:
        """The same where the ranks of each node are summed by its switches."""
        links, tree = self.cluster.accelerator.scale_up, self.constants.link(self.cluster, self.link(c)).switch_tree
        summed, here = self.constants.scale_up[links.kind].in_switch, self._members(c)
        if tree is None or summed is None or c.op != "all_reduce" or not links.sums_in_switch or here == 1:
            return ()
        here_latency = summed.base_latency * links.latency_share
        latency = here_latency + 2 * log2(self._nodes(c)) * tree.hop_latency
        across = 1.0 if self._nodes(c) == 2 else 2 * (c.group_size - 1) / c.group_size
        inside = self._wire(c) / (summed.gain_of(here) * self._inside_rate(c))
        return ((latency, max(inside, across / self._outside_rate(c))),)

    def _nodes(self, c: Collective) -> int:
        return -(-c.group_size // self._members(c))

    def _pat(self, c: Collective) -> Lines:
        """Of an all-gather or reduce-scatter of ranks that are alone in their nodes."""
        pat = self.constants.link(self.cluster, self.link(c)).pat
        if pat is None or c.op not in ("all_gather", "reduce_scatter") or self._members(c) > 1:
            return ()
        latency = pat.base_latency + log2(c.group_size) * pat.hop_latency + c.group_size * pat.rank_latency
        return ((latency, 1 / (pat.bandwidth_share * self._outside_rate(c))),)

    def _protocols(self, c: Collective, protocols: Mapping[str, RingProtocol], steps: float, slope: float) -> Lines:
        """Of each protocol: its steps in turn, each at the latency of the link, and the bytes at their share of the rate."""
        share = self._latency_share(c)
        return tuple(
            (share * (p.base_latency + steps * p.hop_latency), slope / p.bandwidth_share) for p in protocols.values()
        )

    def _latency_share(self, c: Collective) -> float:
        return self.cluster.accelerator.scale_up.latency_share if self.link(c) == "scale-up" else 1.0

    def _all_to_all(self, c: Collective) -> Lines:
        """Each rank sends the members of its own domain their parts over scale-up links, and all others theirs through its own share
        of the NICs, both at once (fabric.md 1.4)."""
        links, together = self.cluster.accelerator.scale_up, self._members(c)
        constants = self.constants.scale_up[links.kind]
        if together == c.group_size and constants.exchange:
            slope = (c.group_size - 1 + constants.copy_share) / c.group_size / self._ring_rate(c)
            return self._protocols(c, constants.exchange, c.group_size - 1, slope)
        inside = (together - 1) / c.group_size / (constants.plateau_share * links.bandwidth)
        if together == c.group_size:
            return ((0.0, inside),)
        outside = self.constants.network.plateau_share * self._line_rate(c)
        return ((0.0, max(inside, (c.group_size - together) / c.group_size / outside)),)

    def link(self, c: Collective) -> LinkTier:
        # A send joins neighbours, but all of a pipeline or a ring wait for the slowest of them.
        return self.cluster.tier(c.stride, c.group_size)

    @property
    def evidence(self) -> str:
        measured = self.cluster.measured
        if measured and measured.collectives:
            return f"measured: {measured.source}"
        return "formula: NCCL's protocols, fitted on nccl-tests inside a node (catalogue/collectives.yaml)"

    @property
    def hides(self) -> bool:
        """Whether communication can run beside computation: not where ranks share the cores that also move the bytes."""
        return self.cluster.node.compute_slots is None

    def _members(self, c: Collective) -> int:
        """How many of the group's ranks share one scale-up domain."""
        return max(1, min(c.group_size, self.cluster.fabric.domain // c.stride))

    def _line_rate(self, c: Collective) -> float:
        """Bytes/s of one rank towards its neighbour, on the slowest link of the group."""
        node, links = self.cluster.node, self.cluster.accelerator.scale_up
        if self.link(c) == "scale-up":
            return links.pair_bandwidth or links.bandwidth
        if node.nics == 0:
            raise UserError(
                f"cluster {self.cluster.name} has no NICs, but {c.group_size} ranks of {c.axis} do not fit in one domain of "
                f"{self.cluster.fabric.domain}: give `node` its nics and nic_bandwidth, or take fewer accelerators"
            )
        return node.nics * node.nic_bandwidth / node.accelerators

    def _ring_rate(self, c: Collective) -> float:
        """Bytes/s through each rank of a ring over the group.

        Across nodes the ring enters and leaves a node over the NICs of all its members there, at most as fast as the
        scale-up links carry it on (fabric.md 1.1). What leaves share beyond the NICs is priced by `cost/fabric`.
        """
        if self.link(c) == "scale-up":
            return self._inside_rate(c)
        return min(self._inside_rate(c), self._outside_rate(c)) if self._members(c) > 1 else self._outside_rate(c)

    def _inside_rate(self, c: Collective) -> float:
        """Of the group's ranks of one domain."""
        links = self.cluster.accelerator.scale_up
        constants = self.constants.scale_up[links.kind]
        if links.ring_bandwidth:
            return interpolate(sorted(links.ring_bandwidth.items()), self._members(c))
        inside = links.effective_bandwidth or constants.plateau_share * links.bandwidth
        if links.topology == "mesh" and links.pair_bandwidth:
            # A ring within part of a mesh has only the links to its members.
            return min(inside, constants.p2p_share * links.pair_bandwidth * (self._members(c) - 1))
        return inside

    def _outside_rate(self, c: Collective) -> float:
        """Of the NICs of the group's ranks of one domain."""
        ports = 1 if self._is_single(c) else self._members(c)
        return self.constants.network.plateau_share * self._line_rate(c) * ports

    def _is_single(self, c: Collective) -> bool:
        return self.single_ring and c.axis in ("dp", "edp")

    def _points_of(self, c: Collective) -> dict[int, dict[int, float]] | None:
        return self._points.get(("p2p" if c.op == "send" else c.op, self.link(c)))

    def _measured(self, c: Collective) -> float:
        by_size = self._points_of(c)
        assert by_size
        at = sorted((ranks, _at(sorted(series.items()), c.bytes)) for ranks, series in by_size.items())
        if c.op == "send":
            return at[0][1]
        # Beyond the sizes measured: each further rank is one more step, over links that all share.
        nearest = min(max(c.group_size, at[0][0]), at[-1][0])
        return interpolate(at, nearest) * (c.group_size - 1) / (nearest - 1)

    @cached_property
    def _points(self) -> dict[tuple[str, LinkTier], dict[int, dict[int, float]]]:
        """(operation, links) to group size to bytes to seconds. What neighbours reached says nothing of slower links."""
        out: dict[tuple[str, LinkTier], dict[int, dict[int, float]]] = {}
        for p in self.cluster.measured.collectives if self.cluster.measured else ():
            out.setdefault((p.op, self.cluster.tier(1, p.ranks)), {}).setdefault(p.ranks, {})[max(1, p.bytes)] = p.seconds
        return out


def _lowest(lines: Iterable[tuple[float, float]]) -> Lines:
    """Those that may be the quickest: of any two, the one with the longer latency takes less for a byte."""
    out: list[tuple[float, float]] = []
    for line in sorted(lines):
        if not out or line[1] < out[-1][1]:
            out.append(line)
    return tuple(out)


def _at(series: list[tuple[int, float]], nbytes: int) -> float:
    largest, slowest = series[-1]
    return interpolate(series, nbytes) if nbytes <= largest else slowest * nbytes / largest
