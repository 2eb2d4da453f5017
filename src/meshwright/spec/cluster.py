"""The machine: accelerator x node x fabric, and what has been measured on it.

All figures are SI base units: bytes, bytes per second, FLOP per second, watts, seconds. Rates are per direction.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LinkTier = Literal["scale-up", "network"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScaleUp(_Frozen):
    """The links inside one scale-up domain (NVLink, xGMI, PCIe, shared memory)."""

    name: str
    bandwidth: float
    """Bytes/s out of one accelerator to the whole domain."""
    pair_bandwidth: float | None = None
    """Bytes/s between two accelerators; below `bandwidth` on meshes."""
    effective_bandwidth: float | None = None
    """What a ring collective reaches, where a source says so."""
    topology: str = "switch"


class Accelerator(_Frozen):
    name: str
    title: str
    vendor: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: dict[str, float]
    """Dense FLOP/s by precision name (fp32, tf32, bf16, fp16, fp8, fp4)."""
    matmul_share: dict[str, float] = Field(default_factory=dict)
    """Largest measured matmul rate as a share of the peak, by precision."""
    scale_up: ScaleUp
    tdp_watts: float | None = None
    confidence: str
    source: str
    notes: str = ""


class Node(_Frozen):
    accelerators: int = Field(ge=1)
    nics: int = Field(ge=0)
    nic_bandwidth: float = Field(ge=0)
    """Bytes/s of one NIC (400 Gbit/s = 50e9)."""
    power_watts: float | None = None
    compute_slots: int | None = None
    """How many ranks of a node can compute at full rate at once; fewer than `accelerators` when ranks share cores."""


class Fabric(_Frozen):
    kind: Literal["rail-optimised", "leaf-spine", "none"]
    transport: Literal["infiniband", "roce", "efa", "ethernet", "none"]
    domain: int = Field(ge=1)
    """Accelerators in one scale-up domain (8 in a DGX, 72 in an NVL72 rack)."""
    unit_nodes: int | None = None
    """Nodes under one set of leaf switches (a scalable unit)."""
    oversubscription: float = Field(default=1.0, ge=1.0)
    """Down capacity over up capacity at the leaf."""


class MatmulPoint(_Frozen):
    """`flops_per_s` of one rank while `active` ranks of the node multiply (m x k) by (k x n)."""

    precision: str
    m: int
    n: int
    k: int
    active: int
    flops_per_s: float


class AttentionPoint(_Frozen):
    """Causal attention of one rank while `active` ranks of the node compute. `flops` counts forward, under the mask only."""

    precision: str
    flops: float
    active: int
    forward_flops_per_s: float
    backward_flops_per_s: float


class CollectivePoint(_Frozen):
    """`bytes`: per-rank buffer of all-reduce and all-to-all, gathered array of all-gather and reduce-scatter, message of p2p."""

    op: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]
    ranks: int
    bytes: int
    seconds: float


class Measured(_Frozen):
    """What `meshwright bench` (or a source) measured on this cluster; these figures replace formulas."""

    source: str
    matmul: tuple[MatmulPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    memory_bandwidth: float | None = None
    """Bytes/s of one rank while all ranks of the node copy."""
    collectives: tuple[CollectivePoint, ...] = ()


class Cluster(_Frozen):
    name: str
    title: str = ""
    accelerator: Accelerator
    node: Node
    fabric: Fabric
    measured: Measured | None = None
    source: str

    def tier(self, stride: int, size: int) -> LinkTier:
        """Which links carry a group of `size` ranks `stride` apart: scale-up if it fits inside one domain."""
        return "scale-up" if stride * size <= self.fabric.domain else "network"
