"""Which part of every parameter a rank holds, and what its gradient needs before it is whole.

This table is the single source for the cost model's state bytes, the engine's slicing, the initialisation
(which must not depend on the layout) and the checkpoint (which sees global tensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.parameters import Parameter, embedding_parameters, head_parameters, layer_parameters

Replicas = Literal["tp", "kv", "embedding"]
"""The ranks that hold the same values: the tp group, the tp ranks that share a key-value head, first and last stage."""

TIED_NAME = "embedding.tokens.weight"


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of one parameter: `length` rows (columns) from `start` along `dim`, or all of it."""

    name: str
    """The parameter's global name."""
    global_shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int
    replicas: Replicas | None
    partial: bool
    """Every replica computes only part of the gradient: it must be summed over `replicas`."""
    decay: bool

    @property
    def shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.global_shape
        return (*self.global_shape[: self.dim], self.length, *self.global_shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        out = 1
        for size in self.shape:
            out *= size
        return out


@lru_cache(maxsize=4096)
def stage_shards(model: Model, layout: Layout, first: bool, last: bool, layers: range, tp_rank: int) -> tuple[Shard, ...]:
    """The shards of a stage that holds `layers` (and the embedding if `first`, the head if `last`), in model order."""
    parameters: list[Parameter] = []
    if first:
        parameters += embedding_parameters(model)
    for layer in layers:
        parameters += layer_parameters(model, layer)
    if last:
        parameters += head_parameters(model)
        if model.tied and not first:
            parameters += [p for p in embedding_parameters(model) if p.name == TIED_NAME]
    return tuple(shard(model, layout, parameter, tp_rank) for parameter in parameters)


def shard(model: Model, layout: Layout, parameter: Parameter, tp_rank: int) -> Shard:
    """The part of `parameter` that tensor-parallel rank `tp_rank` holds."""
    dim, start, length = _cut(model, layout.tp, parameter, tp_rank)
    replicas: Replicas | None = None
    partial = False
    if model.tied and layout.pp > 1 and parameter.name == TIED_NAME:
        replicas, partial = "embedding", True
    elif layout.tp > 1 and parameter.role == "kv" and model.kv_heads < layout.tp:
        replicas, partial = "kv", True
    elif layout.tp > 1 and parameter.role == "head":
        replicas, partial = "tp", True
    elif layout.tp > 1 and parameter.role == "replicated":
        replicas, partial = "tp", layout.sp
    return Shard(parameter.name, parameter.shape, dim, start, length, replicas, partial, parameter.decay)


def _cut(model: Model, tp: int, parameter: Parameter, rank: int) -> tuple[int | None, int, int]:
    """(dim, start, length) of the rank's part. The vocabulary is cut unevenly rather than padded."""
    if tp == 1 or parameter.role in ("replicated", "head"):
        return None, 0, 0
    if parameter.role == "kv" and model.kv_heads < tp:
        head = rank * model.kv_heads // tp
        return 0, head * model.head_dim, model.head_dim
    dim = 1 if parameter.role == "row" else 0
    size = parameter.shape[dim]
    share = -(-size // tp)
    start = min(rank * share, size)
    return dim, start, min(share, size - start)
