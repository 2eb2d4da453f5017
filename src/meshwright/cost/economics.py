"""What a run costs: accelerator hours, energy, money, and what failures take.

M is the mean time between failures of the whole job, w how long training waits for one checkpoint, R how long a failure keeps it
(detect, restart, load), T the time between checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from meshwright.spec.errors import UserError

HOUR, DAY = 3600.0, 86_400.0
JOULES_PER_KWH = 3.6e6


def mean_time_between_failures(nodes: int, failures_per_node_day: float) -> float:
    """Seconds; infinite where nothing fails. Failures of nodes are independent (Kokolis et al. 2024, arXiv 2410.21680): small jobs
    fail more often than that in practice."""
    rate = nodes * failures_per_node_day
    return DAY / rate if rate else math.inf


def young_interval(save: float, between: float) -> float:
    """Seconds between checkpoints by Young 1974: sqrt(2 w M)."""
    return math.sqrt(2 * save * between)


def daly_interval(save: float, between: float) -> float:
    """Seconds between checkpoints by Daly 2006, first order: sqrt(2 w M) - w. Raises UserError where w is not below M / 2."""
    if save >= between / 2:
        raise UserError(
            f"saving takes {save:,.0f} s and a failure comes every {between:,.0f} s: no interval helps; save faster or asynchronously"
        )
    return young_interval(save, between) - save


def best_interval(save: float, between: float, restart: float) -> float:
    """Seconds between checkpoints at which `effective_time_ratio` is largest: sqrt(w^2 + 2 w (M - R)) - w, its zero derivative."""
    if math.isinf(between):
        return math.inf
    if restart >= between:
        raise UserError(
            f"a restart takes {restart:,.0f} s and a failure comes every {between:,.0f} s: the job never gets on"
        )
    return math.sqrt(save**2 + 2 * save * (between - restart)) - save


def effective_time_ratio(interval: float, save: float, between: float, restart: float) -> float:
    """Productive over wall-clock time: (1 - (R + T/2) / M) / (1 + w / T) (arXiv 2410.21680, the same form); never below 0."""
    if math.isinf(between):
        return 1.0 if math.isinf(interval) else 1 / (1 + save / interval)
    if interval == 0:
        return 1 - restart / between if save == 0 else 0.0
    return max(0.0, 1 - (restart + interval / 2) / between) / (1 + save / interval)


@dataclass(frozen=True, slots=True)
class Energy:
    """Electricity of a job."""

    watts: float
    """Drawn while it runs, PUE included."""
    joules: float
    usd: float

    @property
    def kwh(self) -> float:
        return self.joules / JOULES_PER_KWH


def energy(
    accelerators: int, watts: float, seconds: float, usd_per_kwh: float, *, load: float = 1.0, pue: float = 1.0
) -> Energy:
    """Of `accelerators` that draw `watts` each at full load. `pue`: what the building draws over what the machines draw."""
    drawn = accelerators * watts * load * pue
    joules = drawn * seconds
    return Energy(drawn, joules, joules / JOULES_PER_KWH * usd_per_kwh)


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often a job of `nodes` is interrupted, and what checkpoints make of it. Seconds."""

    nodes: int
    failures_per_node_day: float
    save: float
    """Training waits so long for a checkpoint."""
    write: float
    """So long after that it is on storage: what a failure before then takes is lost with the interval before."""
    restart: float
    interval: float

    @property
    def between_failures(self) -> float:
        return mean_time_between_failures(self.nodes, self.failures_per_node_day)

    @property
    def effective_ratio(self) -> float:
        return self._ratio(self.interval)

    @property
    def best_interval(self) -> float:
        """No shorter than a write: the next one could not begin."""
        return max(self.write, best_interval(self.save, self.between_failures, self.restart + self.write))

    @property
    def best_ratio(self) -> float:
        return self._ratio(self.best_interval)

    def _ratio(self, interval: float) -> float:
        return effective_time_ratio(interval, self.save, self.between_failures, self.restart + self.write)


@dataclass(frozen=True, slots=True)
class Bill:
    """A whole training run. Times in seconds, money in USD; `usd_hardware` is None where no price is known."""

    tokens: float
    accelerators: int
    productive_seconds: float
    wall_seconds: float
    interruptions: float
    reliability: Reliability
    checkpoint_bytes: int
    energy: Energy | None
    usd_hardware: float | None
    evidence: dict[str, str]

    @property
    def accelerator_hours(self) -> float:
        """Without spares."""
        return self.accelerators * self.wall_seconds / HOUR

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        r = self.reliability
        return {
            "tokens": self.tokens,
            "accelerators": self.accelerators,
            "productive_s": self.productive_seconds,
            "wall_s": self.wall_seconds,
            "accelerator_hours": self.accelerator_hours,
            "usd_hardware": self.usd_hardware,
            "energy_kwh": self.energy.kwh if self.energy else None,
            "power_watts": self.energy.watts if self.energy else None,
            "usd_energy": self.energy.usd if self.energy else None,
            "nodes": r.nodes,
            "mean_time_between_failures_s": r.between_failures if math.isfinite(r.between_failures) else None,
            "interruptions": self.interruptions,
            "save_s": r.save,
            "write_s": r.write,
            "restart_s": r.restart,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_interval_s": r.interval if math.isfinite(r.interval) else None,
            "best_interval_s": r.best_interval if math.isfinite(r.best_interval) else None,
            "effective_time_ratio": r.effective_ratio,
            "best_effective_time_ratio": r.best_ratio,
            "evidence": self.evidence,
        }
