"""Pipeline stages of equal cost instead of equal depth: the embedding, the head, and layers of different kinds weigh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Piece
from meshwright.cost.pieces import embedding_piece, head_piece, layer_piece
from meshwright.cost.result import Estimate
from meshwright.schedule.stages import consecutive, even_counts
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout


@dataclass(frozen=True, slots=True)
class Balanced:
    """A layout with stages as even in depth as can be, and the better of that and stages of equal cost."""

    even: Estimate
    best: Estimate
    chunk_seconds: tuple[float, ...]
    """Forward and backward of one micro-batch through each chunk of `best`, in the order of the model."""

    @property
    def speedup(self) -> float:
        return self.even.step_time_s / self.best.step_time_s


def balance_stages(estimator: Estimator, layout: Layout) -> Balanced:
    """Choose `stage_layers` so that the slowest chunk is as quick as can be; where that does not pay, or does not fit and even
    stages do, the stages stay even. Raises UserError for a layout without a pipeline, or that cannot run."""
    if layout.pp == 1:
        raise UserError("there is one stage: balancing needs pp of 2 or more, got pp1")
    even = estimator.estimate(replace(layout, stage_layers=None))
    layers, first, last = _layer_seconds(estimator, layout)
    counts = least_maximum_layers(estimator, layout)
    balanced = estimator.estimate(replace(layout, stage_layers=counts))
    better = (not balanced.fits, balanced.step_time_s) < (not even.fits, even.step_time_s)
    best = balanced if better else even
    held = best.layout.stage_layers or even_counts(len(layers), layout.pp * layout.chunks)
    return Balanced(even, best, _chunk_sums(layers, held, first, last))


def least_maximum_layers(estimator: Estimator, layout: Layout) -> tuple[int, ...]:
    """Layers of each chunk, so that the slowest chunk is as quick as can be."""
    layers, first, last = _layer_seconds(estimator, layout)
    return least_maximum(layers, layout.pp * layout.chunks, first, last)


def least_maximum(costs: Sequence[float], parts: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Cut `costs` into `parts` consecutive parts of one or more, so that the largest sum is least, and among such cuts the sum of
    squares; `first` and `last` come on top of the first and the last part. Exact, by dynamic programming over (part, end).

    Raises UserError for more parts than costs.
    """
    if parts > len(costs):
        raise UserError(f"{parts} parts of {len(costs)} layers: every part needs one")
    cut = _Cut(tuple(accumulate(costs, initial=0.0)), parts, first, last)
    bound, _ = cut.least(max, float("inf"))
    return cut.least(lambda before, cost: before + cost**2, bound * (1 + 1e-12))[1]


@dataclass(frozen=True, slots=True)
class _Cut:
    totals: tuple[float, ...]
    parts: int
    first: float
    last: float

    def cost(self, part: int, start: int, end: int) -> float:
        ends = self.first * (part == 0) + self.last * (part == self.parts - 1)
        return self.totals[end] - self.totals[start] + ends

    def least(self, join: Callable[[float, float], float], bound: float) -> tuple[float, tuple[int, ...]]:
        """The least of what `join` makes of the parts' costs, none of them above `bound`, and the lengths of the parts."""
        count = len(self.totals) - 1
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for part in range(self.parts):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end in range(part + 1, count - (self.parts - 1 - part) + 1):
                for start in range(end - 1, part - 1, -1):
                    cost = self.cost(part, start, end)
                    if cost > bound:
                        break  # longer parts cost more
                    if start in best:
                        value = join(best[start][0], cost)
                        if end not in after or value < after[end][0]:
                            after[end] = value, (*best[start][1], end - start)
            best = after
        return best[count]


def _layer_seconds(estimator: Estimator, layout: Layout) -> tuple[list[float], float, float]:
    """Forward and backward of each layer, of the embedding and of the head, for one micro-batch."""
    model, seq, imbalance = estimator.model, estimator.workload.seq, estimator.workload.expert_imbalance

    def seconds(piece: Piece) -> float:
        d = estimator.durations(((piece, 1),), layout, shared=False)
        return d.forward + d.backward

    kinds = [(model.window(i), model.is_moe(i)) for i in range(model.layers)]
    each = {kind: seconds(layer_piece(model, layout, seq, *kind, imbalance)) for kind in set(kinds)}
    return (
        [each[kind] for kind in kinds],
        seconds(embedding_piece(model, layout, seq)),
        seconds(head_piece(model, layout, seq, 0)),
    )


def _chunk_sums(layers: Sequence[float], counts: Sequence[int], first: float, last: float) -> tuple[float, ...]:
    sums = [sum(layers[i] for i in held) for held in consecutive(tuple(counts))]
    sums[0] += first
    sums[-1] += last
    return tuple(sums)
