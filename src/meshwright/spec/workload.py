"""What the cluster is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from meshwright.spec.errors import UserError


@dataclass(frozen=True, slots=True)
class Workload:
    """A training demand: sequences of `seq` tokens, `global_batch` sequences per optimizer step.

    `expert_imbalance`: rows of the fullest expert of a layer over the mean (what training logs as `expert_imbalance_max`), which prices
    the rank that holds it.
    """

    seq: int
    global_batch: int
    expert_imbalance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("seq", "global_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1.0 <= self.expert_imbalance < inf:
            raise UserError(
                f"expert imbalance is the fullest expert's rows over the mean: at least 1, got {self.expert_imbalance:g}"
            )

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.seq * self.global_batch
