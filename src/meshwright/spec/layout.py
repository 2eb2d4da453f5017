"""A Layout: how the work is split. Degrees and modes, nothing about the model or the machine."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from meshwright.spec.errors import UserError, choices

Axis = Literal["dp", "tp", "pp", "cp", "ep"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]
Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp64", "fp32", "bf16", "fp16", "fp8"]

SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
RECOMPUTES: tuple[str, ...] = get_args(Recompute)
PRECISIONS: tuple[str, ...] = get_args(Precision)
DENSE_AXES = ("tp", "cp", "dp", "pp")
"""The axes of the dense world equation, in the default rank order: innermost first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees and modes of one split. Construction refuses what no model or machine could make legal.

    world = pp * dp * cp * tp                 attention and dense layers
    world = pp * edp * ep * etp               experts (parallel folding, arXiv 2504.14960)
    global_batch = dp * micro_batch * micro_batches
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    """Tensor-parallel degree inside one expert."""
    sp: bool = False
    """Sequence parallel: the norm regions hold 1/tp of the sequence."""
    zero: int = 0
    """ZeRO stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    zero_shard: int | None = None
    """Hybrid sharding: shard within groups of this many dp ranks, replicate across them. None: all of dp."""
    chunks: int = 1
    """Virtual stages held by each pipeline stage."""
    schedule: ScheduleName = "1f1b"
    cp_ulysses: int = 1
    """The part of cp done by all-to-all over heads; the rest, cp / cp_ulysses, is a ring."""
    micro_batch: int = 1
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    order: tuple[str, ...] = DENSE_AXES
    """Rank order, innermost (fastest-varying) axis first."""

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "etp", "chunks", "cp_ulysses", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, legal in (("schedule", SCHEDULES), ("recompute", RECOMPUTES), ("precision", PRECISIONS)):
            if getattr(self, name) not in legal:
                raise choices(str(getattr(self, name)), legal, name)
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"ZeRO stage must be 0, 1, 2 or 3, got {self.zero}")
        if sorted(self.order) != sorted(DENSE_AXES):
            raise UserError(f"rank order {'-'.join(self.order)!r} must name each of {', '.join(DENSE_AXES)} once")
        self._refuse_ignored_modes()
        self._refuse_broken_equations()

    def _refuse_ignored_modes(self) -> None:
        """A setting that would be ignored is an error, not a silence."""
        if self.sp and self.tp == 1:
            raise UserError("sequence parallel (sp) splits over tp ranks: it needs tp of 2 or more, got tp1")
        if self.zero and self.dp * self.cp == 1:
            raise UserError(f"zero{self.zero} shards over data-parallel ranks: it needs dp of 2 or more, got dp1")
        if self.pp == 1 and (self.chunks > 1 or self.schedule != "1f1b"):
            raise UserError("a pipeline schedule or chunks need pp of 2 or more, got pp1")
        if (self.chunks > 1) != (self.schedule == "interleaved") and self.schedule not in ("zb-v", "dualpipe-v"):
            raise UserError(
                f"schedule {self.schedule} with {self.chunks} chunk(s) a stage: chunks above 1 go with "
                f"'interleaved', and 'interleaved' needs them (try pp{self.pp}x2:interleaved)"
            )
        if self.schedule in ("zb-v", "dualpipe-v") and self.chunks != 2:
            raise UserError(f"schedule {self.schedule} folds two chunks on each stage: write pp{self.pp}x2:{self.schedule}")

    def _refuse_broken_equations(self) -> None:
        if self.cp % self.cp_ulysses:
            raise UserError(f"cp {self.cp} = ring x ulysses: {self.cp_ulysses} does not divide {self.cp}")
        if self.zero_shard is not None and (self.zero == 0 or self.dp % self.zero_shard or self.zero_shard in (1, self.dp)):
            raise UserError(
                f"hybrid sharding zero{self.zero}x{self.zero_shard}: the shard size must be a proper divisor of dp {self.dp}"
                " above 1, with ZeRO stage 1 or more"
            )
        if (self.world // self.pp) % (self.ep * self.etp):
            raise UserError(
                f"world = pp * edp * ep * etp does not hold: ep {self.ep} x etp {self.etp} = {self.ep * self.etp} "
                f"does not divide dp x cp x tp = {self.world // self.pp}"
            )

    @property
    def world(self) -> int:
        """Ranks: pp * dp * cp * tp."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Data-parallel degree of expert weights."""
        return self.world // (self.pp * self.ep * self.etp)

    @property
    def cp_ring(self) -> int:
        return self.cp // self.cp_ulysses

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same dense weights and see other tokens: dp * cp."""
        return self.dp * self.cp

    @property
    def state_shards(self) -> int:
        """Over how many ranks the state of dense weights is cut."""
        return (self.zero_shard or self.data_ranks) if self.zero else 1

    @property
    def expert_state_shards(self) -> int:
        """Over how many ranks the state of expert weights is cut: as many of the sharding group as hold the same experts."""
        if not self.zero:
            return 1
        return self.edp if self.zero_shard is None else gcd(self.zero_shard, self.edp)

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours on `axis`, by the rank order."""
        out = 1
        for inner in self.order:
            if inner == axis:
                return out
            out *= self.degree(inner)
        raise KeyError(axis)

    def __str__(self) -> str:
        from meshwright.spec.notation import format_layout

        return format_layout(self)
