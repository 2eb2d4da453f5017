"""What a program is made of: operators and collectives, each with the sizes that its price depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


Place = Literal["experts", "head", "router", "elsewhere"]
PLACES: dict[str, Place] = {"moe.experts": "experts", "head": "head", "moe.router": "router"}


class Role(NamedTuple):
    """What of a product's name its price depends on."""

    place: Place
    of_weights: bool
    """The gradient of a weight."""
    of_input: bool


@cache
def role(name: str) -> Role:
    """Of the product with this name."""
    place: Place = next((place for start, place in PLACES.items() if name.startswith(start)), "elsewhere")
    return Role(place, name.endswith(" dw"), name.endswith(" dx"))


class Gemm(NamedTuple):
    """(m x k) by (k x n); with `groups`, that many products of m / groups rows each, of which each has its own matrix; or, of m rows in
    all, one of `largest` rows beside others that share the rest."""

    name: str
    m: int
    n: int
    k: int
    groups: int = 1
    largest: int = 0

    @property
    def is_weight_gradient(self) -> bool:
        return role(self.name).of_weights

    @property
    def role(self) -> Role:
        return role(self.name)

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


class Attention(NamedTuple):
    """Fused causal attention over whole sequences of `length`, of which this rank computes 1 / `share` of the pairs.

    Forward has two matrix products, backward five (FlashAttention-2, arXiv 2307.08691): with the scores recomputed, three have
    the width of queries and keys, two that of values.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    value_dim: int
    window: int | None
    backward: bool
    share: int = 1

    @property
    def flops(self) -> float:
        """Of the entries under the causal (and window) mask only."""
        span = min(self.window or self.length, self.length)
        pairs = span * (self.length - span) + span * (span + 1) / 2
        widths = 3 * self.head_dim + 2 * self.value_dim if self.backward else self.head_dim + self.value_dim
        return 2.0 * self.batch * self.heads * pairs * widths / self.share


class Elementwise(NamedTuple):
    """Work bound by memory: `bytes` read and written."""

    name: str
    bytes: float


class Collective(NamedTuple):
    """`stride` is the distance in ranks between neighbours. `bytes` follows nccl-tests (see `parallel/ledger.py`)."""

    axis: str
    op: CollectiveOp
    group_size: int
    stride: int
    bytes: int


class Under(NamedTuple):
    """A collective that runs while `work` is computed; `calls` of it, one after the other."""

    collective: Collective
    work: tuple[Gemm | Attention, ...]
    calls: int = 1


Op = Gemm | Attention | Elementwise | Collective | Under


PART = "part"
"""Name of a piece whose price is added to that of other pieces of the same layer (`planner/tables.py`)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the model (embedding, one layer, head) run for one micro-batch."""

    name: str
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    saved_bytes: int
    """Kept from forward for backward."""
    working_bytes: int = 0
    """The most that its backward makes beyond what is saved."""
    recomputed: tuple[Op, ...] = ()
    """What of the backward is forward run again."""
    loss_bytes: int = 0
    """The same of the loss, before the gradient of any weight comes."""
    ending_bytes: int = 0
    """What is there when the backward of its first norm ends it: of what was saved, that norm's input alone is left."""
