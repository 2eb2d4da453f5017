"""The machine: accelerator x node x fabric, and what has been measured on it.

All figures are SI base units: bytes, bytes per second, FLOP per second, watts, seconds. Rates are per direction.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meshwright.spec.errors import UserError, choices

LinkTier = Literal["scale-up", "network"]
LinkKind = Literal["nvlink", "xgmi", "pcie", "gloo", "other"]
CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
PeakName = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"]

Positive = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScaleUp(_Frozen):
    """The links inside one scale-up domain (NVLink, xGMI, PCIe, shared memory)."""

    name: str
    kind: LinkKind = "other"
    """Whose latencies apply (catalogue/collectives.yaml); "other" where no source gives any."""
    bandwidth: Positive
    """Bytes/s out of one accelerator to the whole domain."""
    pair_bandwidth: Positive | None = None
    """Bytes/s between two accelerators; below `bandwidth` on meshes."""
    effective_bandwidth: Positive | None = None
    """What a ring collective reaches, where a source says so."""
    ring_bandwidth: dict[int, Positive] = Field(default_factory=dict)
    """The same by ranks, where it depends on them: cards behind several switches and sockets."""
    topology: str = "switch"
    latency_share: Positive = 1.0
    """Of the latencies of this kind of link (catalogue/collectives.yaml), where a measurement says otherwise."""
    sums_in_switch: bool = False
    """Whether the switches sum an all-reduce on its way (NVLink SHARP)."""


class Accelerator(_Frozen):
    name: str
    title: str
    vendor: str
    memory_bytes: int = Field(gt=0)
    memory_bandwidth: Positive
    processors: int | None = Field(default=None, ge=1)
    """Streaming multiprocessors or compute units, which a product's tiles are dealt to. None: not known, or no such units."""
    peak_flops: dict[str, Positive]
    """Dense FLOP/s by precision name (a `PeakName`; int8 in integer operations/s). Absent: unknown or unsupported."""
    matmul_share: dict[str, Positive] = Field(default_factory=dict)
    """Largest measured matmul rate as a share of the peak, by precision."""
    memory_share: Positive | None = None
    """Largest measured copy rate as a share of `memory_bandwidth`. None: the usual share (catalogue/kernels.yaml)."""
    overhead_bytes: int | None = Field(default=None, ge=0)
    """What context, communication library and allocator take beside tensors. None: the usual (catalogue/kernels.yaml)."""
    scale_up: ScaleUp
    host_bandwidth: Positive | None = None
    """Bytes/s between its memory and the host's, in either direction, both at once. None: not known, or its memory is the host's."""
    tdp_watts: Positive | None = None
    confidence: str
    source: str
    notes: str = ""

    @model_validator(mode="after")
    def _known_precisions(self) -> Self:
        for figures in (self.peak_flops, self.matmul_share):
            for precision in figures:
                if precision not in get_args(PeakName):
                    raise choices(precision, get_args(PeakName), "precision")
        if unrated := sorted(set(self.matmul_share) - set(self.peak_flops)):
            raise UserError(f"matmul_share is a share of peak_flops, which has no {', '.join(unrated)}")
        return self


class Node(_Frozen):
    accelerators: int = Field(ge=1)
    nics: int = Field(ge=0)
    nic_bandwidth: float = Field(ge=0)
    """Bytes/s of one NIC (400 Gbit/s = 50e9)."""
    power_watts: Positive | None = None
    host_memory_bytes: Positive | None = None
    """Of the host, for what its ranks offload. None: not known, and taken to be enough."""
    file_bandwidth: Positive | None = None
    """Bytes/s that its ranks together read and write in files on its own drives. None: not known."""
    compute_slots: int | None = Field(default=None, ge=1)
    """How many ranks of a node can compute at full rate at once; fewer than `accelerators` when ranks share cores."""

    @model_validator(mode="after")
    def _nics_carry(self) -> Self:
        if (self.nics == 0) != (self.nic_bandwidth == 0):
            raise UserError(f"nics {self.nics} with nic_bandwidth {self.nic_bandwidth:g}: both are above 0, or both are 0")
        return self


class Fabric(_Frozen):
    kind: Literal["rail-optimised", "leaf-spine", "none"]
    transport: Literal["infiniband", "roce", "efa", "ethernet", "none"]
    domain: int = Field(ge=1)
    """Accelerators in one scale-up domain (8 in a DGX, 72 in an NVL72 rack)."""
    unit_nodes: int | None = Field(default=None, ge=1)
    """Nodes under one set of leaf switches (a scalable unit)."""
    oversubscription: float = Field(default=1.0, ge=1.0)
    """Down capacity over up capacity at the leaf."""
    pod_nodes: int | None = Field(default=None, ge=1)
    """Nodes that reach each other without the core, a multiple of `unit_nodes`. None: what two tiers of the leaf's switch hold."""
    core_oversubscription: float = Field(default=1.0, ge=1.0)
    """What a pod's leaves send up over what its spines send on to the core."""

    @model_validator(mode="after")
    def _kind_has_transport(self) -> Self:
        if (self.kind == "none") != (self.transport == "none"):
            raise UserError(f"kind {self.kind} with transport {self.transport}: a fabric has both, or both are none")
        if self.pod_nodes is not None and (self.unit_nodes is None or self.pod_nodes % self.unit_nodes):
            raise UserError(
                f"pod_nodes {self.pod_nodes} is not a multiple of unit_nodes {self.unit_nodes}: pods hold whole units"
            )
        return self


class MatmulPoint(_Frozen):
    """`flops_per_s` of one rank while `active` ranks of the node multiply (m x k) by (k x n)."""

    precision: str
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    active: int = Field(ge=1)
    flops_per_s: Positive


class AttentionPoint(_Frozen):
    """Causal attention of one rank while `active` ranks of the node compute.

    `flops` counts forward, under the mask only.
    """

    precision: str
    flops: Positive
    active: int = Field(ge=1)
    forward_flops_per_s: Positive
    backward_flops_per_s: Positive


class CollectivePoint(_Frozen):
    """The seconds of one collective.

    `bytes`: per-rank buffer of all-reduce and all-to-all, gathered array of all-gather and reduce-scatter, message of p2p.
    """

    op: CollectiveOp | Literal["p2p"]
    ranks: int = Field(ge=2)
    bytes: int = Field(ge=0)
    seconds: Positive


class Measured(_Frozen):
    """What `meshwright bench` (or a source) measured on this cluster; these figures replace formulas."""

    source: str
    matmul: tuple[MatmulPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    memory_bandwidth: Positive | None = None
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
        """Which links carry a group of `size` ranks `stride` apart: scale-up if it fits inside one domain.

        Domains are filled with whole groups: groups of 16 take 64 of an NVL72's 72 accelerators.
        """
        return "scale-up" if stride * size <= self.fabric.domain else "network"
