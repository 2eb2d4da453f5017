"""How far predictions of published runs were off, by class of run: the error bars of new ones (`benchmarks/residuals.py` writes them)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meshwright.spec.catalogue import read_data
from meshwright.spec.yaml_edge import validate

SHARE = 0.8
"""Of the runs of a class lie within its bar, every source of them with the same weight."""


class ErrorBar(BaseModel):
    """Measured over predicted: `SHARE` of the runs lie from `low` to `high`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    runs: int = Field(ge=1)
    sources: int = Field(ge=1)
    widened: bool = False
    """Of too few sources to stand alone: to the widest of the other classes."""

    def around(self, value: float) -> tuple[float, float]:
        return value * self.low, value * self.high

    def as_dict(self, value: float) -> dict[str, Any]:
        """For `--json`, of a predicted `value`."""
        low, high = self.around(value)
        return {
            "low": low,
            "high": high,
            "share": SHARE,
            "runs": self.runs,
            "sources": self.sources,
            "widened": self.widened,
            "basis": "published",
        }


class Residuals(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    step_time: dict[str, ErrorBar]
    """By class of run."""
    source: str


def step_class(nodes: int, has_experts: bool) -> str:
    """The class of a training run: what its step depends on differs most between these."""
    if has_experts:
        return "experts"
    return "one node" if nodes == 1 else "several nodes"


@lru_cache
def load_residuals() -> Residuals:
    return validate(Residuals, read_data("residuals.yaml"))
