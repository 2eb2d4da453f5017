"""What pricing a layout gives: step time, memory, traffic, and what each rests on."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from meshwright.cost.memory import StageMemory
from meshwright.cost.offload import OffloadCost
from meshwright.cost.timeline import Timeline
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.residuals import ErrorBar
from meshwright.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """All calls of one operation on one axis in a step, on the stage that sends most of it."""

    axis: str
    op: str
    group_size: int
    stage: int
    link: str
    count: int
    bytes: int
    time_s: float
    exposed_s: float
    """The part that nothing hides."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a layout costs. Sizes in bytes, times in seconds, rates per second."""

    layout: Layout
    model: str
    cluster: str
    workload: Workload
    step_time_s: float
    mfu: float
    hfu: float
    bubble: float
    fits: bool
    memory: tuple[StageMemory, ...]
    memory_limit_bytes: int
    host_limit_bytes: float
    """Of the host's memory, for what a rank offloads; infinite where it is not known."""
    collectives: tuple[CollectiveCost, ...]
    breakdown: dict[str, float]
    """Seconds of the step by what the busiest stage spends them on."""
    evidence: dict[str, str]
    error_bar: ErrorBar | None = None
    """Of the step's time; None where no published runs of its class were scored."""
    offload: OffloadCost | None = None
    timeline: Timeline | None = field(default=None, repr=False)

    @property
    def tokens_per_s(self) -> float:
        return self.workload.tokens / self.step_time_s

    @property
    def peak_bytes(self) -> int:
        return max(stage.total_bytes for stage in self.memory)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "layout": str(self.layout),
            "world": self.layout.world,
            "model": self.model,
            "cluster": self.cluster,
            "seq": self.workload.seq,
            "global_batch": self.workload.global_batch,
            "expert_imbalance": self.workload.expert_imbalance,
            "micro_batches": micro_batches(self.layout, self.workload),
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / self.layout.world,
            "tokens_per_day": self.tokens_per_s * 86_400,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "bubble": self.bubble,
            "fits": self.fits,
            "memory_limit_bytes": self.memory_limit_bytes,
            "host_limit_bytes": self.host_limit_bytes if isfinite(self.host_limit_bytes) else None,
            "memory": [
                {"stage": s.stage, "total_bytes": s.total_bytes, "categories": s.categories, "away": s.away}
                for s in self.memory
            ],
            "offload": {name: getattr(self.offload, name) for name in OffloadCost.__slots__} if self.offload else None,
            "collectives": [{name: getattr(c, name) for name in CollectiveCost.__slots__} for c in self.collectives],
            "breakdown": self.breakdown,
            "evidence": self.evidence,
            "error_bars": {"step_time_s": self.error_bar.as_dict(self.step_time_s)} if self.error_bar else {},
        }


@dataclass(frozen=True, slots=True)
class Price:
    """Of a layout, without its tables."""

    step_time_s: float
    peak_bytes: int
    fits: bool
