"""The fullest moment of a step: what a rank holds beside its state, computation by computation.

A forward leaves what its pieces save. A backward goes through them from the last to the first: what a piece saved is there until it
is through, and while it runs there are its temporaries too. Of a backward in two halves the first leaves, instead of what was saved,
the inputs of linears and the gradients of their outputs, until the second is through. The buffers of whole gradients only grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from meshwright.cost.gradients import STEADY, GradientBuffers
from meshwright.cost.ops import Gemm, Piece, Under
from meshwright.cost.program import Pieces, Program
from meshwright.schedule.actions import Kind, Schedule
from meshwright.schedule.pairs import computations
from meshwright.spec.layout import Layout
from meshwright.spec.precision import StateBytes, StateDtypes


@dataclass(frozen=True)
class ChunkBytes:
    """Of one micro-batch on one chunk; the tuples are of each piece, in the order of the model."""

    saved: tuple[int, ...]
    working: tuple[int, ...]
    loss: int
    put_off: tuple[int, ...]
    product: int
    """The largest that the second half of a split backward makes before it is added to a gradient."""

    @classmethod
    def of(cls, pieces: Pieces, layout: Layout) -> ChunkBytes:
        bytes_ = StateBytes.of(layout)
        its = [(piece, put_off_bytes(piece, bytes_.compute)) for piece, repeat in pieces for _ in range(repeat)]
        products = [g.m * g.n * bytes_.compute for piece, _ in pieces for g in weight_gradients(piece) if g.groups == 1]
        return cls(
            tuple(piece.saved_bytes for piece, _ in its),
            tuple(piece.working_bytes for piece, _ in its),
            its[-1][0].loss_bytes,
            tuple(later for _, later in its),
            max(products, default=0) if bytes_.gradient > bytes_.compute else 0,
        )

    @cached_property
    def kept(self) -> int:
        return sum(self.saved)

    @cached_property
    def deferred(self) -> int:
        return sum(self.put_off)

    def backward(self, *, split: bool) -> list[tuple[int, int]]:
        """(activations, temporaries) of this micro-batch while backward is at each piece, in the order of the model."""
        out, here, later = [], self.kept, 0
        for saved, working, put_off in zip(self.saved[::-1], self.working[::-1], self.put_off[::-1], strict=True):
            out.append((here + later, working))
            here, later = here - saved, later + put_off * split
        return out[::-1]


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


def moments(program: Program, layout: Layout, schedule: Schedule, stage: int) -> Iterator[Moment]:
    """What a rank of `stage` holds through a step; moments like others are left out."""
    chunks, buffers = [ChunkBytes.of(pieces, layout) for pieces in program.chunks], GradientBuffers(program, layout)
    at = {split: [chunk.backward(split=split) for chunk in chunks] for split in (False, True)}
    sizes = [*(chunk.kept for chunk in chunks), *(chunk.deferred for chunk in chunks)]
    held, done, seen = [0] * len(sizes), [0] * len(chunks), set[tuple[int, bool, int]]()
    for unit in computations(schedule, stage):
        # Of a pair both passes run: what the forward leaves is there, and its temporaries too.
        beside = max(chunks[unit[0].chunk].working) if len(unit) > 1 else 0
        for action in unit:
            kind, here = action.kind, action.chunk
            if kind is Kind.FORWARD:
                held[here] += 1
            elif kind.gives_input_gradient:
                held[here] -= 1
                split, others = kind is Kind.BACKWARD_INPUT, _sum(held, sizes)
                is_changing = buffers.is_used and min(done) < STEADY
                done[here] += 1
                if is_changing or (here, split, others + beside) not in seen:
                    seen.add((here, split, others + beside))
                    yield Moment(others + chunks[here].kept, chunks[here].loss + beside, buffers.bytes)
                    its = at[split][here]
                    for place in buffers.backward(here, split=split) if is_changing else range(len(its)):
                        yield Moment(others + its[place][0], its[place][1] + beside, buffers.bytes)
                held[len(chunks) + here] += split
            elif kind is Kind.BACKWARD_WEIGHT:
                now = Moment(_sum(held, sizes), chunks[here].product, buffers.bytes)
                yield now
                if buffers.is_used:
                    for _ in buffers.weights(here):
                        yield Moment(now.activations, now.working, buffers.bytes)
                held[len(chunks) + here] -= 1
    yield Moment(0, _widened_bytes(program, layout), buffers.bytes)


def _sum(counts: list[int], sizes: list[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def _widened_bytes(program: Program, layout: Layout) -> int:
    """Gradients that the optimizer's arithmetic needs wider than they are kept, bucket by bucket."""
    is_wider = StateDtypes.of(layout).update != StateDtypes.of(layout).gradient
    return 4 * max(bucket.owned for bucket in program.buckets) if is_wider else 0


def fullest(program: Program, layout: Layout, schedule: Schedule, stage: int) -> Moment:
    """The moment at which a rank of `stage` holds most, in any step but the first: it finds all buffers made."""
    every = list(moments(program, layout, schedule, stage))
    most = max(every, key=lambda moment: moment.activations + moment.working)
    return Moment(most.activations, most.working, every[-1].gradients)
