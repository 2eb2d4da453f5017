"""What recompute frees of a layer's memory, and what it costs, for every local choice of a space that needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from meshwright.cost.attention import attention_core
from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import PART, Op, Piece
from meshwright.cost.parts import Shapes
from meshwright.cost.pieces import coreless_layer_piece
from meshwright.planner.arrays import Floats, Ints, distinct
from meshwright.planner.space import Local, Relief, Space
from meshwright.planner.tables import Kind
from meshwright.spec.layout import Layout

FIGURES = 3
"""Of a layer under a mode of recompute: bytes that it does not keep, seconds of what runs again, and seconds that the host takes to
start that."""


class ReliefFigures:
    """Of the layers of each kind. A layer is asked for once without its attention core, and its core once, as in the tables."""

    def __init__(self, space: Space, estimator: Estimator, kinds: Sequence[Kind]):
        self.gpus, self.precision, self.workload, self.model = space.gpus, space.precision, space.workload, space.model
        self.estimator, self.kinds = estimator, kinds
        modes = list(dict.fromkeys(replace(relief, offload="none") for relief in space.reliefs))
        self._modes = modes
        self.mode = np.array([modes.index(replace(relief, offload="none")) for relief in space.reliefs])
        """[reliefs]: which row of `of` each one takes."""
        self.shape = len(modes), len(kinds), FIGURES
        """Of a combination's figures."""
        self._known: dict[tuple[int, Local, tuple[int, int]], Floats] = {}
        self._rests: dict[tuple[object, ...], Floats] = {}
        self._cores: dict[tuple[object, ...], Floats] = {}
        self._whole: dict[tuple[object, ...], Piece] = {}

    def of(self, space: Space, at: Ints, relief: Ints) -> Floats:
        """[modes, kinds, 3, n]: of the combinations `at` of a space of the problem under the modes of `relief`; zeros for others, and where
        nothing runs again."""
        keys, _, which = distinct(space.local[at] * len(space.experts) + space.expert[at])
        each = [(space.locals[key // len(space.experts)], space.experts[key % len(space.experts)]) for key in keys.tolist()]
        out = np.zeros((*self.shape, len(keys)))
        for mode in distinct(self.mode[relief]).keys.tolist():
            if self._modes[mode].recompute != "none":
                for row, (one, experts) in enumerate(each):
                    out[mode, ..., row] = self._each(mode, one, experts)
        return out[..., which]

    def _each(self, mode: int, one: Local, experts: tuple[int, int]) -> Floats:
        """[kinds, 3]"""
        key = mode, one, experts
        if key not in self._known:
            of = self._modes[mode]
            kinds = [
                self._rest(one, experts if moe else (1, 1), moe, of) + self._core(one, window, of)
                for window, moe in self.kinds
            ]
            self._known[key] = np.array(kinds)
        return self._known[key]

    def _rest(self, one: Local, experts: tuple[int, int], moe: bool, mode: Relief) -> Floats:
        """Of a layer without its core."""
        parts = tuple(part for part in mode.parts if part != "core") if mode.recompute == "selective" else ()
        if mode.recompute != "full" and not parts:
            return np.zeros(FIGURES)
        layer = one.tp, one.sp, one.tokens(self.workload.seq), one.tp_inside, experts, moe
        key = *layer, mode.recompute, parts
        if key not in self._rests:
            kept = one.layout(self.gpus, self.precision, *experts)
            if layer not in self._whole:
                self._whole[layer] = self._piece(kept, moe)
            again = replace(kept, recompute=mode.recompute, recompute_parts=parts or mode.parts)
            rest = self._piece(again, moe)
            self._rests[key] = self._figures(self._whole[layer].saved_bytes - rest.saved_bytes, rest.recomputed, again)
        return self._rests[key]

    def _piece(self, layout: Layout, moe: bool) -> Piece:
        return coreless_layer_piece(self.model, layout, self.workload.seq, moe, self.workload.expert_imbalance)

    def _core(self, one: Local, window: int | None, mode: Relief) -> Floats:
        full = mode.recompute == "full"
        if not (full or (mode.recompute == "selective" and "core" in mode.parts)):
            return np.zeros(FIGURES)
        key = one.tp, one.cp, one.ulysses, one.micro_batch, one.cp_place, window, full
        if key not in self._cores:
            layout = one.layout(self.gpus, self.precision)
            core = attention_core(Shapes(self.model, layout, self.workload.seq), window)
            freed, again = core.saved, core.forward
            if not full:
                layout = replace(layout, recompute="selective")
                kept = attention_core(Shapes(self.model, layout, self.workload.seq), window)
                freed, again = core.saved - kept.saved, kept.recomputed
            self._cores[key] = self._figures(freed, again, layout)
        return self._cores[key]

    def _figures(self, freed: int, again: tuple[Op, ...], layout: Layout) -> Floats:
        found = self.estimator.pieces.of(Piece(PART, again, (), 0), layout, shared=False)
        host = self.estimator.kernels(layout, shared=False).dispatch * found.forward_launches
        return np.array([freed, found.forward, host])
