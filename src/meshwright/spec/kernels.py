"""Shares of the hardware's rates that computation usually reaches, where nothing better is known of an accelerator."""

from __future__ import annotations

from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

from meshwright.spec.catalogue import read_data
from meshwright.spec.yaml_edge import validate


class AttentionShares(BaseModel):
    """Of a fused kernel, over the largest matmul's rate: FLOPs under the mask, long sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward: float = Field(gt=0, le=1)
    backward: float = Field(gt=0, le=1)
    newer: float = Field(default=1.0, gt=0, le=1)
    """Of that, on accelerators newer than the kernel: those with fp8 units, whose asynchronous copies it leaves unused."""


class KernelConstants(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul_share: float = Field(gt=0, le=1)
    """Largest matmul's rate over the peak."""
    sustained_share: float = Field(gt=0, le=1)
    """Of the largest matmul's rate, kept up step after step by products that fill the accelerator."""
    tiles: tuple[tuple[int, int, float], ...]
    """Rows, columns and share of the rate of each tile of a product that kernels are built for."""
    tile_fill: float = Field(ge=0)
    """Steps of the inner dimension that starting and writing out a tile cost."""
    least_split: int = Field(ge=1)
    """Inner elements that a product cut along them keeps at least."""
    attention: dict[str, AttentionShares]
    """By kind of fused kernel."""
    attention_fill: float = Field(ge=0)
    """Tokens of a sequence at which a fused kernel reaches half of its rate."""
    score_passes: dict[str, float]
    """Times that attention which writes its scores out reads or writes them in forward, beside its two products."""
    norm_passes: float = Field(ge=1)
    """Bytes that a norm moves operator by operator, over those of one kernel."""
    passes: float = Field(ge=1)
    """Bytes that memory-bound operators move in frameworks without a compiler (casts, copies, sums), over those of the operators."""
    gap: float = Field(ge=0)
    """Seconds between the end of a kernel and the first work of the next."""
    beside: float = Field(ge=0)
    """Of the seconds of a collective that runs beside computation: what the computation loses to it."""
    dispatch: float = Field(ge=0)
    """Seconds of the host for each operator, where no compiler takes it away."""
    checkpoint: float = Field(ge=0)
    """Half of the host's seconds to save and restore the random state of a layer that frameworks run again whole."""
    memory_share: float = Field(gt=0, le=1)
    """Copy rate over the memory's line rate."""
    overhead_bytes: int = Field(ge=0)
    sources: dict[str, str]


@lru_cache
def load_kernel_constants() -> KernelConstants:
    return validate(KernelConstants, read_data("kernels.yaml"))
