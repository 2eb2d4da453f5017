"""Seconds of one micro-batch through pieces of the program: operators in order, what hides under what, and the host that starts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from meshwright.cost.adapt import is_recomputed
from meshwright.cost.collectives import CollectiveTimes
from meshwright.cost.kernels import Kernels
from meshwright.cost.ops import PART, Attention, Collective, Elementwise, Gemm, Op, Piece, Under
from meshwright.cost.practice import Practice
from meshwright.cost.program import Pieces
from meshwright.spec.cluster import Cluster
from meshwright.spec.kernels import KernelConstants
from meshwright.spec.layout import Layout


class Durations(NamedTuple):
    """Seconds of one micro-batch on a stage."""

    forward: float
    backward: float
    compute: float
    """Forward and backward without communication."""
    weight: float
    """The part of the backward that a zero-bubble schedule can put off: the products that make weight gradients."""
    forward_experts: float = 0.0
    """The part of the forward in which tokens travel to or from experts."""
    backward_experts: float = 0.0
    forward_scale_up: float = 0.0
    """Of communication on the links of a domain in the forward, hidden or not; so, too, the next three."""
    forward_network: float = 0.0
    backward_scale_up: float = 0.0
    backward_network: float = 0.0
    forward_launches: float = 0.0
    """Operators that the host starts in the forward, at the least."""
    backward_launches: float = 0.0

    @property
    def forward_links(self) -> OnLinks:
        return OnLinks(self.forward_scale_up, self.forward_network)

    @property
    def backward_links(self) -> OnLinks:
        return OnLinks(self.backward_scale_up, self.backward_network)


class OnLinks(NamedTuple):
    """Seconds of communication by the links that it takes."""

    scale_up: float = 0.0
    network: float = 0.0

    def and_(self, other: OnLinks) -> OnLinks:
        return OnLinks(self.scale_up + other.scale_up, self.network + other.network)


class _Run(NamedTuple):
    """Seconds of one pass through a piece."""

    compute: float
    exposed: float
    """Communication that nothing hides."""
    weight: float
    """Of the products that make weight gradients."""
    experts: float
    """In which tokens travel to or from experts."""
    links: OnLinks
    launches: int

    @property
    def whole(self) -> float:
        return self.compute + self.exposed


class PieceTimes:
    """Prices pieces on one cluster under one practice; remembers each."""

    def __init__(self, cluster: Cluster, practice: Practice, constants: KernelConstants, times: CollectiveTimes):
        self.cluster, self.practice, self.constants, self.times = cluster, practice, constants, times
        self._seconds: dict[tuple[int, bool], tuple[Piece, Durations]] = {}
        self._kernels: dict[tuple[str, int], Kernels] = {}
        self._inside: dict[tuple[int, int], bool] = {}

    def durations(self, pieces: Pieces, layout: Layout, *, shared: bool) -> Durations:
        """One micro-batch through `pieces`; `shared` when all ranks of a node compute at once."""
        kernels = self.kernels(layout, shared=shared)
        each = [(self._of(piece, kernels, shared), repeat) for piece, repeat in pieces]
        return Durations(*(sum(d[i] * repeat for d, repeat in each) for i in range(len(Durations._fields))))

    def of(self, piece: Piece, layout: Layout, *, shared: bool) -> Durations:
        """The same of one piece."""
        return self._of(piece, self.kernels(layout, shared=shared), shared)

    def computation(self, ops: Sequence[Op], layout: Layout) -> float:
        """Seconds of what of `ops` is no communication, on a rank that has its node for itself."""
        return self._run(ops, self.kernels(layout, shared=False), 0.0, 0.0).compute

    def kernels(self, layout: Layout, *, shared: bool) -> Kernels:
        active = min(layout.world, self.cluster.node.accelerators) if shared else 1
        key = (layout.precision, active)
        if key not in self._kernels:
            self._kernels[key] = Kernels(self.cluster, layout.precision, active, self.practice, self.constants)
        return self._kernels[key]

    def _of(self, piece: Piece, kernels: Kernels, shared: bool) -> Durations:
        key = (id(piece), shared)
        if key not in self._seconds:
            forward, backward = (
                self._run(ops, kernels, host, waited) for ops, host, waited in self._launched(piece, kernels)
            )
            # The piece is kept beside its price, so that its id is not used again.
            self._seconds[key] = (
                piece,
                Durations(
                    forward.whole,
                    backward.whole,
                    forward.compute + backward.compute,
                    backward.weight,
                    forward.experts,
                    backward.experts,
                    *forward.links,
                    *backward.links,
                    forward.launches,
                    backward.launches,
                ),
            )
        return self._seconds[key][1]

    def _host_seconds(self, piece: Piece, ops: tuple[Op, ...], kernels: Kernels) -> float:
        # Bounds add up parts of a layer: what one part waits for the host, another may compute.
        return 0.0 if piece.name == PART else kernels.host_seconds(ops, is_recomputed(piece))

    def host_waits(self, piece: Piece, layout: Layout) -> tuple[float, float]:
        """Seconds that forward and backward of `piece` wait for the host that starts their kernels."""
        kernels = self.kernels(layout, shared=False)
        forward, backward = (
            self._run(ops, kernels, host, waited).whole - self._run(ops, kernels, 0.0, 0.0).whole
            for ops, host, waited in self._launched(piece, kernels)
        )
        return forward, backward

    def _launched(self, piece: Piece, kernels: Kernels) -> Iterator[tuple[tuple[Op, ...], float, float]]:
        """Forward and backward, each with the seconds of starting its kernels and with those that the host waits for the device."""
        waited = kernels.waited_seconds(piece.forward) if piece.name == "layer" else 0.0
        yield piece.forward, self._host_seconds(piece, piece.forward, kernels), waited
        again = waited and is_recomputed(piece)
        yield piece.backward, self._host_seconds(piece, piece.backward, kernels), waited if again else 0.0

    def _run(self, ops: Sequence[Op], kernels: Kernels, host: float, waited: float) -> _Run:
        """Of `ops` in order. `host`: seconds of starting them.

        The host launches kernels while earlier ones run: where all of them take less than the launches, those are what lasts. Where
        it waits for the device, `waited` seconds of that come on top of what the kernels take.
        """
        compute = exposed = weight = experts = inside = outside = 0.0
        launches = len(ops)
        for op in ops:
            if isinstance(op, Gemm):
                seconds = kernels.gemm(op)
                compute += seconds
                if op.is_weight_gradient:
                    weight += seconds
            elif isinstance(op, Attention):
                compute += kernels.attention(op)
            elif isinstance(op, Elementwise):
                compute += kernels.elementwise(op)
            elif isinstance(op, Collective):
                seconds = self.times.seconds(op)
                exposed += self._exposed_in_line(op, seconds)
                if self._is_inside(op):
                    inside += seconds
                else:
                    outside += seconds
                if op.axis == "ep":
                    experts += seconds
            else:
                launches += len(op.work)
                work, seconds = 0.0, self.times.seconds(op.collective) * op.calls
                for one in op.work:
                    lasts = kernels.gemm(one) if isinstance(one, Gemm) else kernels.attention(one)
                    work += lasts
                    if isinstance(one, Gemm) and one.is_weight_gradient:
                        weight += lasts
                if self._is_inside(op.collective):
                    inside += seconds
                else:
                    outside += seconds
                compute += work
                exposed += self._exposed_under(op, seconds, work)
        return _Run(max(compute + waited, host - exposed), exposed, weight, experts, OnLinks(inside, outside), launches)

    def on_links(self, calls: Iterable[Collective]) -> OnLinks:
        """Seconds of `calls`."""
        each = [(self.times.seconds(c), self._is_inside(c)) for c in calls]
        return OnLinks(sum(s for s, is_inside in each if is_inside), sum(s for s, is_inside in each if not is_inside))

    def _is_inside(self, c: Collective) -> bool:
        key = (c.group_size, c.stride)
        if key not in self._inside:
            self._inside[key] = self.times.link(c) == "scale-up"
        return self._inside[key]

    def _exposed_in_line(self, op: Collective, seconds: float) -> float:
        """Of a collective of `seconds` between two products, of which all but a part can run in pieces beside them."""
        if not self.practice.overlaps_tensor or op.axis != "tp":
            return seconds
        return seconds / op.group_size + self.constants.beside * seconds * (1 - 1 / op.group_size)

    def work(self, op: Under, kernels: Kernels) -> float:
        return sum(kernels.gemm(g) if isinstance(g, Gemm) else kernels.attention(g) for g in op.work)

    def exposed(self, op: Under, work: float) -> float:
        """Seconds of its communication that `work` seconds of computation do not hide."""
        return self._exposed_under(op, self.times.seconds(op.collective) * op.calls, work)

    def _exposed_under(self, op: Under, seconds: float, work: float) -> float:
        hides = self.times.hides and (self.practice.overlaps_dx or op.collective.op != "all_reduce")
        return self.beside(seconds, work) if hides else seconds

    def beside(self, seconds: float, work: float, busiest: float = 0.0) -> float:
        """What communication of `seconds` adds to computation of `work` seconds that it runs beside: the part that does not fit,
        and what the rest takes from the computation (processors and memory bandwidth). `busiest`: seconds of all that the fullest link
        carries in that time, its own among them: a link does one thing at a time."""
        left = min(seconds, max(0.0, seconds - work, busiest - work))
        return left + self.constants.beside * (seconds - left)
