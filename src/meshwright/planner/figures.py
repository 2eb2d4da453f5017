"""What layers, their experts and both ends of the model cost on a rank: the estimator's own prices, each asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import add, sub
from typing import NamedTuple

from meshwright.cost.attention import attention_core
from meshwright.cost.estimate import Estimator
from meshwright.cost.experts import expert_outputs, routed, shared_expert
from meshwright.cost.ops import PART, Piece
from meshwright.cost.parts import Part, Shapes, gated_mlp
from meshwright.cost.peak import put_off_bytes
from meshwright.cost.pieces import coreless_layer_piece, embedding_piece, head_piece
from meshwright.planner.orders import Order
from meshwright.planner.space import Local, Space
from meshwright.spec.layout import Layout
from meshwright.spec.precision import STATE_BYTES


class Figures(NamedTuple):
    """Of a layer, of the embedding or of the head, for one micro-batch."""

    forward: float
    """Seconds."""
    backward: float
    weight: float
    """Of the backward, what makes the weight gradients."""
    crowded: float
    """Seconds of both passes while every rank of the node computes."""
    saved: float = 0.0
    """Bytes kept for backward."""
    put_off: float = 0.0
    """Bytes that the weights' half of a split backward needs."""
    forward_scale_up: float = 0.0
    """Seconds in which the links of a domain carry its communication in the forward; so, too, the next three."""
    forward_network: float = 0.0
    backward_scale_up: float = 0.0
    backward_network: float = 0.0
    forward_host: float = 0.0
    """Seconds that the host takes to start its operators, at the least; a pass lasts no less."""
    backward_host: float = 0.0
    context: float = 0.0
    """Seconds of both passes in which nothing hides what context parallelism sends."""
    working: float = 0.0
    """Bytes of the largest temporary."""


class LayerFigures:
    """Of a model on so many accelerators. Attention itself does not depend on how norms are cut, nor the rest of a layer on how its
    tokens are cut into sequences, nor experts on how attention is cut: each is priced apart."""

    def __init__(self, space: Space, estimator: Estimator):
        self.gpus, self.precision, self.workload = space.gpus, space.precision, space.workload
        self.model, self.estimator = space.model, estimator
        self._known: dict[tuple[object, ...], Figures] = {}
        self._layouts: dict[tuple[Local, tuple[int, int]], Layout] = {}

    def layers(self, one: Local, windows: Sequence[int | None]) -> list[Figures]:
        """Of a layer without experts, with each window."""
        rest = self._rest(one)
        return [Figures(*map(add, rest, self._core(one, window))) for window in windows]

    def working(self, one: Local) -> float:
        """Of such a layer."""
        return self._rest(one).working

    def boundary(self, one: Local) -> int:
        """Bytes of one hidden state that a stage sends."""
        own = self.tokens(one) // one.tp if one.sp else self.tokens(one)
        return own * self.model.hidden * STATE_BYTES[self.precision].parameter

    def tokens(self, one: Local) -> int:
        """Of a micro-batch on a rank."""
        return one.tokens(self.workload.seq)

    def ends(self, one: Local) -> tuple[Figures, Figures]:
        """Of the embedding and of the head."""
        seq, key, positions = (
            self.workload.seq,
            (one.tp, one.sp, self.tokens(one), one.tp_inside),
            1 if self.model.rope else one.cp,
        )
        return (
            self._once(("embedding", *key, positions), one, lambda layout: embedding_piece(self.model, layout, seq)),
            self._once(("head", *key), one, lambda layout: head_piece(self.model, layout, seq, 0)),
        )

    def beside_experts(self, tokens: int, tp: int, sp: bool, order: Order) -> Figures:
        """What else changes where an MLP gives way to experts; its working memory apart."""
        assert self.model.experts is not None
        experts, one = self.model.experts, Local(tp, sp, 1, 1, 1, order)
        key = tokens, tp, sp, one.tp_inside

        def part(name: str, make: Callable[[Shapes], Part]) -> Figures:
            return self._once((name, *key), one, lambda layout: _of_part(make(Shapes(self.model, layout, tokens))))

        shared, outputs = (
            part("shared", lambda s: shared_expert(s, experts)),
            part("outputs", lambda s: expert_outputs(s, experts)),
        )
        mlp = part("mlp", lambda s: gated_mlp(s, "mlp", self.model.ffn // tp))
        return Figures(*map(sub, map(add, shared, outputs), mlp))._replace(working=0.0)

    def experts(self, tokens: int, ep: int, etp: int) -> Figures:
        """Of the routed experts of a layer, to which a rank brings so many tokens."""
        experts, uneven = self.model.experts, self.workload.expert_imbalance
        assert experts is not None
        return self._once(
            ("experts", tokens, ep, etp),
            Local(1, False, 1, 1, 1),
            lambda layout: _of_part(routed(Shapes(self.model, layout, tokens, uneven), experts)),
            (ep, etp),
        )

    def _rest(self, one: Local) -> Figures:
        """Of a layer without its attention core."""
        key = "rest", one.tp, one.sp, self.tokens(one), one.tp_inside
        return self._once(key, one, lambda layout: coreless_layer_piece(self.model, layout, self.workload.seq))

    def _core(self, one: Local, window: int | None) -> Figures:
        key = "core", one.tp, one.cp, one.ulysses, one.micro_batch, one.cp_place, window
        if key not in self._known:
            layout = self._layout(one)
            core = attention_core(Shapes(self.model, layout, self.workload.seq), window)
            self._known[key] = _figures(self.estimator, _of_part(core), layout, sends_context=True)
        return self._known[key]

    def _layout(self, one: Local, experts: tuple[int, int] = (1, 1)) -> Layout:
        if (one, experts) not in self._layouts:
            self._layouts[one, experts] = one.layout(self.gpus, self.precision, *experts)
        return self._layouts[one, experts]

    def _once(
        self, key: tuple[object, ...], one: Local, piece: Callable[[Layout], Piece], experts: tuple[int, int] = (1, 1)
    ) -> Figures:
        if key not in self._known:
            layout = self._layout(one, experts)
            self._known[key] = _figures(self.estimator, piece(layout), layout)
        return self._known[key]


def _of_part(part: Part) -> Piece:
    return Piece(PART, part.forward, part.backward, part.saved, part.working)


def _figures(estimator: Estimator, piece: Piece, layout: Layout, *, sends_context: bool = False) -> Figures:
    if piece.name != PART:
        piece = replace(piece, name=PART)
    alone, crowded = estimator.pieces.of(piece, layout, shared=False), 0.0
    if estimator.cluster.node.compute_slots is not None:
        busy = estimator.pieces.of(piece, layout, shared=True)
        crowded = busy.forward + busy.backward
    working = max(piece.working_bytes, piece.loss_bytes)
    put_off = put_off_bytes(piece, STATE_BYTES[layout.precision].parameter)
    dispatch = estimator.kernels(layout, shared=False).dispatch
    return Figures(
        alone.forward,
        alone.backward,
        alone.weight,
        crowded,
        piece.saved_bytes,
        put_off,
        *alone.forward_links,
        *alone.backward_links,
        dispatch * alone.forward_launches,
        dispatch * alone.backward_launches,
        alone.forward + alone.backward - alone.compute if sends_context else 0.0,
        working,
    )
