"""The fullest moment of a step: what a rank holds beside its state, computation by computation.

A forward leaves what its pieces save. A backward goes through them from the last to the first: what a piece saved is there until it
is through, and while it runs there are its temporaries too. Of a backward in two halves the first leaves, instead of what was saved,
the inputs of linears and the gradients of their outputs, until the second is through. The buffers of whole gradients only grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import mul

from meshwright.cost.gradients import GradientBuffers
from meshwright.cost.ops import Gemm, Piece, Under
from meshwright.cost.program import Pieces, Program
from meshwright.schedule.actions import Kind, Schedule
from meshwright.spec.layout import Layout
from meshwright.spec.precision import StateBytes, StateDtypes


@dataclass(frozen=True)
class ChunkBytes:
    """Of one micro-batch on one chunk; the tuples are of each piece, in the order of the model."""

    saved: tuple[int, ...]
    working: tuple[int, ...]
    loss: int
    put_off: tuple[int, ...]
    ending: tuple[int, ...]
    product: int
    """The largest that the second half of a split backward makes before it is added to a gradient."""

    @classmethod
    def of(cls, pieces: Pieces, layout: Layout) -> ChunkBytes:
        bytes_ = StateBytes.of(layout)
        each = [(piece, put_off_bytes(piece, bytes_.compute), repeat) for piece, repeat in pieces]
        its = [(piece, later) for piece, later, repeat in each for _ in range(repeat)]
        products = [g.m * g.n * bytes_.compute for piece, _ in pieces for g in weight_gradients(piece) if g.groups == 1]
        return cls(
            tuple(piece.saved_bytes for piece, _ in its),
            tuple(piece.working_bytes for piece, _ in its),
            its[-1][0].loss_bytes,
            tuple(later for _, later in its),
            tuple(piece.ending_bytes for piece, _ in its),
            max(products, default=0) if bytes_.gradient > bytes_.compute else 0,
        )

    @cached_property
    def kept(self) -> int:
        return sum(self.saved)

    @cached_property
    def deferred(self) -> int:
        return sum(self.put_off)

    def backward(self, *, split: bool) -> list[tuple[int, int]]:
        """(activations, temporaries) of this micro-batch while backward is at each piece, the end included."""
        out, here, later = [], self.kept, 0
        its = zip(self.saved[::-1], self.working[::-1], self.put_off[::-1], self.ending[::-1], strict=True)
        for saved, working, put_off, ending in its:
            out.append((here + later, max(working, ending + put_off * split - saved)))
            here, later = here - saved, later + put_off * split
        return out


def put_off_bytes(piece: Piece, width: int) -> int:
    """What the weights' half of a backward needs: the inputs of linears, once for those that share one, and the gradients of their
    outputs; elements of `width` bytes."""
    inputs: dict[tuple[str, int, int], int] = {}
    gradients = 0
    for gemm in weight_gradients(piece):
        place = gemm.name.rsplit(".", 1)[0] if "." in gemm.name else gemm.name
        inputs[place, gemm.n, gemm.k] = gemm.n * gemm.k * gemm.groups
        gradients += gemm.m * gemm.k
    return width * (sum(inputs.values()) + gradients)


def weight_gradients(piece: Piece) -> Iterator[Gemm]:
    """The products of its backward that can be put off."""
    for op in piece.backward:
        for gemm in op.work if isinstance(op, Under) else (op,):
            if isinstance(gemm, Gemm) and gemm.is_weight_gradient:
                yield gemm


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes beside the state."""

    activations: int = 0
    working: int = 0
    gradients: int = 0
    """Buffers of whole gradients."""

    @property
    def total(self) -> int:
        return self.activations + self.working + self.gradients


class Fullest:
    """The fullest moment of ranks that hold the same `program`, whichever stage of `schedule` they are of."""

    def __init__(self, program: Program, layout: Layout, schedule: Schedule):
        self.schedule = schedule
        self._buffers, self._widened = GradientBuffers(program, layout), _widened_bytes(program, layout)
        chunks = self._chunks = [ChunkBytes.of(pieces, layout) for pieces in program.chunks]
        self._sizes = [*(chunk.kept for chunk in chunks), *(chunk.deferred for chunk in chunks)]
        # Of a pair both passes run: beside a whole backward are the temporaries of a forward of another chunk.
        self._beside = [
            max((max(o.working) for o in chunks if o is not own), default=0) * schedule.paired for own in chunks
        ]
        self._own: dict[tuple[Kind, int], tuple[int, int]] = {}

    def of(self, stage: int) -> Moment:
        """In any step but the first: it finds all buffers made."""
        here, own, working = 0, 0, self._widened
        for kind, chunk, held in self.schedule.backwards(stage):
            if (kind, chunk) not in self._own:
                self._own[kind, chunk] = self._fullest_of(kind, chunk)
            its, beside = self._own[kind, chunk]
            others = sum(map(mul, held, self._sizes))
            if others + its + beside > here + own + working:
                here, own, working = others, its, beside
        return Moment(here + own, working, self._buffers.bytes_of(self.schedule, stage))

    def _fullest_of(self, kind: Kind, here: int) -> tuple[int, int]:
        """The same of one backward, or half of one, of chunk `here`, without what the rank holds of others."""
        chunk = self._chunks[here]
        if kind is Kind.BACKWARD_WEIGHT:
            return chunk.deferred, chunk.product
        other = self._beside[here] if kind is Kind.BACKWARD else 0
        each = ((own, working + other) for own, working in chunk.backward(split=kind is Kind.BACKWARD_INPUT))
        return max(((chunk.kept, chunk.loss + other), *each), key=sum)


def _widened_bytes(program: Program, layout: Layout) -> int:
    """Gradients that the optimizer's arithmetic needs wider than they are kept, bucket by bucket."""
    is_wider = StateDtypes.of(layout).update != StateDtypes.of(layout).gradient
    return 4 * max(bucket.owned for bucket in program.buckets) if is_wider else 0
