"""What collectives cost beyond their bytes: latencies, floors and the share of a link that they reach, by kind of link.

They are meant for this alpha-beta model (NCCL v2.30.7 src/graph/tuning.cc; factor as in nccl-tests doc/PERFORMANCE.md):

    ring collective    max(floor, min over protocols of base + hops * hop + (bytes * factor + own copy) / (bandwidth_share * rate))
    all-to-all         the same with `exchange` and n - 1 hops; without it, bytes over the plateau
    summed in switch   base + (bytes * factor + own copy) / (gain * rate), for all-reduce where it is less
    tree over nodes    all-reduce where it is less: base + 2 ((g - 1) inside + log2(N) hop) + bytes * 2 / (bandwidth_share * rate) for
                       N nodes with g ranks each; two nodes only exchange, so that their NICs carry half as much
    the same, summed   the base of a sum in the switch + 2 log2(N) hop + bytes * factor / rate, at most that of the switches
    PAT                all-gather and reduce-scatter of groups with one rank a node, where it is less:
                       base + log2(N) hop + n rank + bytes / (bandwidth_share * rate)
    point to point     p2p_latency + bytes / (p2p_share * pair rate)

hops: 2 (n - 1) for all-reduce, n - 1 for all-gather and reduce-scatter, each at the latency of the link it crosses.
rate: `ring_bandwidth` or `effective_bandwidth` of the scale-up links where one is known, else plateau_share * line rate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meshwright.spec.catalogue import read_data
from meshwright.spec.cluster import Cluster, CollectiveOp, LinkKind, LinkTier
from meshwright.spec.errors import UserError
from meshwright.spec.yaml_edge import validate

Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RingProtocol(_Frozen):
    """One way to move a ring's chunks: the quick ones spend bandwidth on flags."""

    base_latency: Seconds
    """Seconds before the first hop."""
    hop_latency: Seconds
    """Seconds of each hop over this link."""
    bandwidth_share: Share
    """Of the rate that the best protocol reaches."""


class InSwitch(_Frozen):
    """All-reduce whose sums are made by the switch (NVLS)."""

    base_latency: Seconds
    gain: dict[int, float]
    """Over the ring's rate, by ranks; fewer ranks than the least gain nothing, more than the most gain as the most."""

    def gain_of(self, ranks: int) -> float:
        return max((gain for least, gain in self.gain.items() if least <= ranks), default=1.0)


class Tree(_Frozen):
    """All-reduce up and down a double binary tree of nodes, in a chain inside each."""

    protocols: dict[str, RingProtocol] = Field(min_length=1)
    inside: dict[str, Seconds]
    """Of each hop inside a node, by protocol."""


class SwitchTree(_Frozen):
    """The same where the switches of a node sum for its ranks (NVLSTree)."""

    hop_latency: Seconds
    """Of each level of the tree, up or down."""


class Pat(_Frozen):
    """All-gather and reduce-scatter in a logarithmic number of steps (arXiv 2506.20252)."""

    base_latency: Seconds
    hop_latency: Seconds
    rank_latency: Seconds
    """Of each rank: what is still linear in it."""
    bandwidth_share: Share


class LinkConstants(_Frozen):
    protocols: dict[str, RingProtocol] = Field(min_length=1)
    exchange: dict[str, RingProtocol] = Field(default_factory=dict)
    """Of all-to-all inside one domain."""
    copy_share: float = Field(default=0.0, ge=0)
    """Of the ring's rate over that of a rank's copy of its own part from input to output, which takes time too."""
    in_switch: InSwitch | None = None
    """Where the switches can sum (`ScaleUp.sums_in_switch`)."""
    tree: Tree | None = None
    switch_tree: SwitchTree | None = None
    pat: Pat | None = None
    """These three of links between nodes."""
    floors: dict[CollectiveOp, Seconds]
    """Measured seconds of the smallest message; no call is quicker. Absent: none was measured."""
    p2p_latency: Seconds
    p2p_share: Share
    """Of the pair rate, reached by one large send."""
    plateau_share: Share
    """Of the line rate, reached by a large ring collective."""
    sources: dict[str, str]
    """Where each figure above comes from, by field name."""

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Self:
        fields = type(self).model_fields
        given = {
            name
            for name in self.model_fields_set - {"sources"}
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }
        if missing := sorted(given - set(self.sources)):
            raise UserError(f"sources lacks {', '.join(missing)}")
        return self


class CollectiveConstants(_Frozen):
    scale_up: dict[LinkKind, LinkConstants]
    network: LinkConstants

    def link(self, cluster: Cluster, tier: LinkTier) -> LinkConstants:
        return self.network if tier == "network" else self.scale_up[cluster.accelerator.scale_up.kind]


@lru_cache
def load_collective_constants() -> CollectiveConstants:
    return validate(CollectiveConstants, read_data("collectives.yaml"))
