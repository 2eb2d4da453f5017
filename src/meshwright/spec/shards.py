"""Which part of every parameter a rank holds, and what its gradient needs before it is whole.

This table is the single source for the cost model's state bytes, the engine's slicing, the initialisation
(which must not depend on the layout) and the checkpoint (which sees global tensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal

from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.parameters import Parameter, embedding_parameters, head_parameters, layer_parameters

Replicas = Literal["tp", "kv", "embedding", "etp"]
"""The ranks that hold the same values: the tp group, the tp ranks that share a key-value head, first and last stage, the
ranks that share an expert."""

Cut = tuple[int, int, int]
"""(dim, start, length): `length` rows from `start` along `dim`."""

TIED_NAME = "embedding.tokens.weight"


@dataclass(frozen=True)
class Shard:
    """One rank's part of one parameter: all of it, but for `cuts`."""

    name: str
    """The parameter's global name."""
    global_shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    replicas: Replicas | None
    partial: bool
    """Every replica computes only part of the gradient: it must be summed over `replicas`."""
    decay: bool
    routed: bool
    """Belongs to the routed experts: its data-parallel ranks are edp, not dp x cp."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        out = list(self.global_shape)
        for dim, _, length in self.cuts:
            out[dim] = length
        return tuple(out)

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def gathered(self) -> bool:
        """Whether ZeRO-3 cuts the parameter itself. Vectors and routers stay whole on every rank: next to nothing in bytes, they
        would double the number of messages (as DeepSpeed's persistence threshold finds)."""
        return self.decay and ".router." not in self.name

    def of(self, whole: Any) -> Any:
        """This part of the whole parameter, a tensor with `narrow`."""
        for dim, start, length in self.cuts:
            whole = whole.narrow(dim, start, length)
        return whole


@dataclass(frozen=True, slots=True)
class Split:
    """What of a layout decides who holds which part: every layout that differs in the rest shares its shards."""

    tp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int = 1
    ends_apart: bool = False
    """The first and the last layers are on different ranks."""

    @classmethod
    def of(cls, layout: Layout) -> Split:
        apart = layout.pp > 1 and layout.schedule not in ("zb-v", "dualpipe-v")
        return cls(layout.tp, layout.sp, layout.ep, layout.etp, apart)


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's index on each axis that cuts parameters."""

    tp: int = 0
    ep: int = 0
    etp: int = 0


@lru_cache(maxsize=4096)
def chunk_shards(model: Model, split: Split, seat: Seat, layers: range, first: bool, last: bool) -> tuple[Shard, ...]:
    """The shards of consecutive `layers` (with the embedding if `first`, the head if `last`), in model order."""
    parameters: list[Parameter] = []
    if first:
        parameters += embedding_parameters(model)
    for layer in layers:
        parameters += layer_parameters(model, layer)
    if last:
        parameters += head_parameters(model)
        if model.tied and split.ends_apart:
            parameters += [p for p in embedding_parameters(model) if p.name == TIED_NAME]
    return tuple(shard(model, split, seat, parameter) for parameter in parameters)


def shard(model: Model, split: Split, seat: Seat, parameter: Parameter) -> Shard:
    """The part of `parameter` that the rank at `seat` holds."""
    replicas, partial = _replicas(model, split, parameter)
    cuts = _expert_cuts(split, seat, parameter) if parameter.routed else _cut(model, split.tp, parameter, seat.tp)
    return Shard(parameter.name, parameter.shape, cuts, replicas, partial, parameter.decay, parameter.routed)


def _replicas(model: Model, split: Split, parameter: Parameter) -> tuple[Replicas | None, bool]:
    """(who holds the same, whether each of them has only part of the gradient)."""
    if parameter.name == TIED_NAME and model.tied and split.ends_apart:
        return "embedding", True
    if parameter.role == "expert":  # added once, by the first of the ranks that share the expert
        return ("etp", True) if split.etp > 1 else (None, False)
    if split.tp == 1:
        return None, False
    if parameter.role == "kv" and model.kv_heads < split.tp:
        return "kv", True
    if parameter.role == "head":
        return "tp", True
    if parameter.role == "replicated":
        # Routers see 1/tp of the tokens, the norms of latent vectors serve 1/tp of the heads, all others under sequence parallel
        # see 1/tp of the tokens.
        return "tp", split.sp or ".router." in parameter.name or "_down_norm." in parameter.name
    return None, False


def _cut(model: Model, tp: int, parameter: Parameter, rank: int) -> tuple[Cut, ...]:
    """The vocabulary is cut unevenly rather than padded."""
    if tp == 1 or parameter.role in ("replicated", "head"):
        return ()
    if parameter.role == "kv" and model.kv_heads < tp:
        head = rank * model.kv_heads // tp
        return ((0, head * model.head_dim, model.head_dim),)
    dim = 1 if parameter.role == "row" else 0
    size = parameter.shape[dim]
    share = -(-size // tp)
    start = min(rank * share, size)
    return ((dim, start, min(share, size - start)),)


def _expert_cuts(split: Split, seat: Seat, parameter: Parameter) -> tuple[Cut, ...]:
    """Whole experts over ep, then inside each over etp."""
    parts = [(0, split.ep, seat.ep)]
    if parameter.role != "expert":
        parts.append((1 if parameter.role == "expert_column" else 2, split.etp, seat.etp))
    lengths = [(dim, index, parameter.shape[dim] // count) for dim, count, index in parts if count > 1]
    return tuple((dim, index * length, length) for dim, index, length in lengths)
