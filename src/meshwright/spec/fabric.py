"""How networks between nodes behave where a cluster does not say (catalogue/fabric.yaml)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from meshwright.spec.catalogue import read_data
from meshwright.spec.yaml_edge import validate


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rate(_Frozen):
    value: float = Field(gt=0)
    source: str


class Count(_Frozen):
    value: int = Field(ge=1)
    source: str


class Share(_Frozen):
    value: float = Field(gt=0, le=1)
    source: str


class FabricConstants(_Frozen):
    switch_bandwidth: Rate
    """Bytes/s of one switch, per direction."""
    queue_pairs: Count
    spraying_share: Share
    spreading: dict[Literal["infiniband", "efa", "roce", "ethernet"], Literal["adaptive", "hashed"]]


@lru_cache
def load_fabric_constants() -> FabricConstants:
    return validate(FabricConstants, read_data("fabric.yaml"))
