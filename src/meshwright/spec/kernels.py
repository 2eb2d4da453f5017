"""Shares of the hardware's rates that computation usually reaches, where nothing better is known of an accelerator."""

from __future__ import annotations

from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

from meshwright.spec.catalogue import read_data
from meshwright.spec.yaml_edge import validate


class KernelConstants(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul_share: float = Field(gt=0, le=1)
    """Largest matmul's rate over the peak."""
    attention_share: float = Field(gt=0, le=1)
    """Fused attention's rate over the largest matmul's."""
    memory_share: float = Field(gt=0, le=1)
    """Copy rate over the memory's line rate."""
    overhead_bytes: int = Field(ge=0)
    sources: dict[str, str]


@lru_cache
def load_kernel_constants() -> KernelConstants:
    return validate(KernelConstants, read_data("kernels.yaml"))
