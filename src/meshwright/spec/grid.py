"""The rank grid of a Layout: coordinates and groups, without torch.

This is the only rank arithmetic in Meshwright. `parallel/mesh.py` adds process groups to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks 0..world-1 laid out by `layout.order`, the first axis varying fastest."""

    layout: Layout

    @property
    def world(self) -> int:
        return self.layout.world

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name to index on that axis."""
        if not 0 <= rank < self.world:
            raise UserError(f"rank {rank} is outside the world of {self.world} ranks")
        out = {}
        for axis in self.layout.order:
            rank, out[axis] = divmod(rank, self.layout.degree(axis))
        return out

    def rank(self, **coordinates: int) -> int:
        """The rank at the given coordinates; axes left out are 0."""
        return sum(index * self.layout.stride(axis) for axis, index in coordinates.items())

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` only, in axis order."""
        here = self.coordinates(rank)
        return tuple(self.rank(**{**here, axis: i}) for i in range(self.layout.degree(axis)))

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group of `axis`, ordered by first rank."""
        return sorted({self.group(axis, rank) for rank in range(self.world)})

    def kv_group(self, rank: int, replicas: int) -> tuple[int, ...]:
        """The `replicas` neighbouring tp ranks that hold the same key-value head."""
        tp = self.group("tp", rank)
        start = self.coordinates(rank)["tp"] // replicas * replicas
        return tp[start : start + replicas]

    def embedding_group(self, rank: int) -> tuple[int, ...]:
        """First and last stage at this rank's other coordinates: the two holders of a tied embedding."""
        pp = self.group("pp", rank)
        return (pp[0], pp[-1]) if len(pp) > 1 else pp
