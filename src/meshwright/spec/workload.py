"""What the cluster is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.spec.errors import UserError


@dataclass(frozen=True, slots=True)
class Workload:
    """A training demand: sequences of `seq` tokens, `global_batch` sequences per optimizer step."""

    seq: int
    global_batch: int

    def __post_init__(self) -> None:
        for name in ("seq", "global_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.seq * self.global_batch
