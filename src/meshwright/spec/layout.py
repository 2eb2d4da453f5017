"""A Layout: how the work is split. Degrees and modes, nothing about the model or the machine."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from meshwright.spec.errors import UserError, choices

Axis = Literal["dp", "tp", "pp", "cp", "ep"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]
Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp64", "fp32", "bf16", "fp16", "fp8", "fp4"]

RecomputePart = Literal["core", "norms", "activation", "mlp"]
Offload = Literal["none", "optimizer", "all"]
OffloadTo = Literal["cpu", "file"]

SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
RECOMPUTES: tuple[str, ...] = get_args(Recompute)
PRECISIONS: tuple[str, ...] = get_args(Precision)
RECOMPUTE_PARTS: tuple[RecomputePart, ...] = get_args(RecomputePart)
OFFLOADS: tuple[str, ...] = get_args(Offload)
OFFLOAD_PLACES: tuple[str, ...] = get_args(OffloadTo)
DENSE_AXES = ("tp", "cp", "dp", "pp")
"""The axes of the dense world equation, in the default rank order: innermost first."""
PAIRING: tuple[ScheduleName, ...] = ("dualpipe-v",)
"""Schedules whose steady state is pairs of a forward and a backward that need nothing of each other (`schedule/pairs.py`)."""


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
    async_tp: bool = False
    """Sequence parallel's gathers and scatters in pieces, each under the product of another."""
    async_ep: bool = False
    """Tokens travel to and from experts while another micro-batch is computed, in a schedule that runs the two as a pair."""
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
    recompute_parts: tuple[RecomputePart, ...] = ("core",)
    """What selective recompute runs again: the attention core, the norms, the MLP's activation function, the whole MLP."""
    recompute_layers: int | None = None
    """Recompute only the first so many layers of each chunk. None: all."""
    precision: Precision = "bf16"
    """What is computed in."""
    parameter_dtype: Precision | None = None
    """What parameters are kept in between steps. None: as computed in, with a fp32 master copy where that is narrower."""
    gradient_dtype: Precision | None = None
    """What gradients are summed and reduced in. None: fp32 where the compute precision is narrower, else the same."""
    offload: Offload = "none"
    """What waits outside the accelerator until it is needed: the optimizer state, or (with ZeRO-3) the parameters too."""
    offload_to: OffloadTo = "cpu"
    stage_layers: tuple[int, ...] | None = None
    """Layers of each chunk, in the order of the model. None: as even as can be."""
    order: tuple[str, ...] = DENSE_AXES
    """Rank order, innermost (fastest-varying) axis first."""

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "etp", "chunks", "cp_ulysses", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, legal in (
            ("schedule", SCHEDULES),
            ("recompute", RECOMPUTES),
            ("precision", PRECISIONS),
            ("offload", OFFLOADS),
            ("offload_to", OFFLOAD_PLACES),
        ):
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
        if self.async_tp and not self.sp:
            raise UserError(
                f"async tensor parallel hides the communication of sequence parallel: it needs sp, got tp{self.tp} without: "
                f"write tp{max(2, self.tp)}:async"
            )
        if self.async_ep:
            self._refuse_ignored_pairs()
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

        self._refuse_ignored_memory_modes()

    def _refuse_ignored_pairs(self) -> None:
        if self.ep == 1:
            raise UserError("ep:async hides the way to experts on other ranks: it needs ep of 2 or more, got ep1")
        if self.schedule not in PAIRING:
            pp = max(2, self.pp)
            raise UserError(
                f"ep{self.ep}:async runs a forward and a backward as a pair, which {self.schedule} on pp{self.pp} does not have: write "
                f"{' or '.join(f'pp{pp}x2:{name}' for name in PAIRING)}, or ep{self.ep}"
            )
        if self.zero == 3 or (self.parameter_dtype is not None and self.parameter_dtype != self.precision):
            given = "zero3" if self.zero == 3 else f"params:{self.parameter_dtype}"
            raise UserError(
                f"ep{self.ep}:async with {given}: both passes of a pair would bring parameters through the same buffers: try "
                f"{'zero1 or zero2' if self.zero == 3 else f'params:{self.precision}'}, or ep{self.ep}"
            )

    def _refuse_ignored_memory_modes(self) -> None:
        if self.recompute_parts != ("core",) and self.recompute != "selective":
            raise UserError(f"a list of parts to recompute goes with selective recompute, not with ac:{self.recompute}")
        if not self.recompute_parts or self.recompute_parts != tuple(
            p for p in RECOMPUTE_PARTS if p in self.recompute_parts
        ):
            given = "+".join(self.recompute_parts)
            raise UserError(
                f"parts to recompute {given!r}: name each at most once, in this order: {', '.join(RECOMPUTE_PARTS)}"
            )
        if {"mlp", "activation"} <= set(self.recompute_parts):
            raise UserError("recomputing the mlp runs its activation again too: leave activation out")
        if self.recompute_layers is not None and (self.recompute == "none" or self.recompute_layers < 1):
            raise UserError(
                f"recompute of {self.recompute_layers} layers: give a mode (ac:full:{self.recompute_layers}) and 1 or more"
            )
        for name in ("parameter_dtype", "gradient_dtype"):
            given = getattr(self, name)
            if given is not None and given not in ("fp32", self.precision):
                raise UserError(f"{name.replace('_', ' ')} {given} with {self.precision}; legal: {self.precision}, fp32")
            if given == "fp32" and self.precision == "fp64":
                raise UserError(f"{name.replace('_', ' ')} fp32 is narrower than the fp64 that is computed in")
        if self.offload == "none" and self.offload_to != "cpu":
            raise UserError(f"offload to a {self.offload_to} needs to know what: write offload:optimizer@{self.offload_to}")
        if self.offload == "all" and self.zero != 3:
            raise UserError(
                f"offload:all keeps parameters away between uses, which is ZeRO-3's: got zero{self.zero}; try offload:optimizer"
            )
        if self.stage_layers is not None:
            if len(self.stage_layers) != self.pp * self.chunks or min(self.stage_layers) < 1:
                given = "-".join(map(str, self.stage_layers))
                raise UserError(f"stages:{given} must give 1 or more layers for each of the {self.pp * self.chunks} chunks")
            if self.pp == 1:
                raise UserError("stages:... needs a pipeline: pp of 2 or more, got pp1")

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
