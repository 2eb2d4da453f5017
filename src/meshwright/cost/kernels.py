"""Seconds of one operator on one accelerator: measured rates where there are any, a roofline otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from meshwright.cost.ops import Attention, Elementwise, Gemm, Op, Role, Under, role
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.tiles import product_seconds
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.kernels import KernelConstants, load_kernel_constants
from meshwright.spec.layout import Precision
from meshwright.spec.precision import NARROW, NARROW_MULTIPLE, STATE_BYTES, kept_in

NARROWED_BYTES = 5
"""Moved to make an element of a narrow factor of a bf16 one: it is read for the largest, read again, and written (`parallel/fp8.py`)."""
NARROWING_STEPS = 8
"""Kernels to do so, of which all but two work on one number."""
KERNELS = 3
"""Of an operator, about: what `KernelConstants.dispatch` is of."""


@dataclass(frozen=True)
class Kernels:
    """Rates of `cluster` in `precision` while `active` ranks of a node compute."""

    cluster: Cluster
    precision: Precision
    active: int
    practice: Practice = OWN
    constants: KernelConstants = field(default_factory=load_kernel_constants)
    _products_priced: dict[tuple[int, int, int, int, int, Role], float] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Layers and layouts repeat their products, and many are alike but for their names."""
    _attention_priced: dict[Attention, float] = field(default_factory=dict, repr=False, compare=False)
    _rates: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def gemm(self, op: Gemm) -> float:
        """A product's roofline, with the tiles that it is cut into where the accelerator's processors are known."""
        key = (op.m, op.n, op.k, op.groups, op.largest, role(op.name))
        seconds = self._products_priced.get(key)
        if seconds is None:
            seconds = self._products_priced[key] = self._gemm(op)
        return seconds

    def attention(self, op: Attention) -> float:
        """Fused or not, as the practice has it."""
        seconds = self._attention_priced.get(op)
        if seconds is None:
            seconds = self._attention_priced[op] = self._attention(op)
        return seconds

    def _gemm(self, op: Gemm) -> float:
        if self._is_looped(op):
            return sum(count * self.gemm(one) for count, one in self._each(op))
        products = self._products(op)
        moved = self._size * (op.m * op.k + op.groups * op.k * op.n + op.m * op.n) / self.memory_bandwidth
        if self._measured_matmul and products == self._kept:
            return max(op.flops / self._matmul_rate(op.flops), moved)
        rate = self._matmul_rate(op.flops, products)
        processors = self.cluster.accelerator.processors
        seconds = (
            product_seconds(op, rate, processors, self.memory_bandwidth, self.constants) if processors else op.flops / rate
        )
        return max(seconds, moved) + self._cast(op, products) + self._gap

    def _is_looped(self, op: Gemm) -> bool:
        return op.groups > 1 and not self.practice.grouped_products and op.role.place == "experts"

    def _each(self, op: Gemm) -> Iterator[tuple[int, Gemm]]:
        """The products of experts one by one, alike ones together."""
        if op.largest:
            yield 1, op._replace(m=op.largest, groups=1, largest=0)
        alike = op.groups - (op.largest > 0)
        if op.m > op.largest:
            yield alike, op._replace(m=-(-(op.m - op.largest) // alike), groups=1, largest=0)

    @cached_property
    def _size(self) -> int:
        """Bytes of an element."""
        return STATE_BYTES[self.precision].parameter

    @cached_property
    def _kept(self) -> Precision:
        """What everything but narrow products is computed in."""
        return kept_in(self.precision)

    def _products(self, op: Gemm) -> str:
        """The precision of a product: the head's stays that of the layout."""
        if self.practice.products:
            return self.practice.products if op.role.place != "head" else self._kept
        return self.precision if self._is_narrowed(op) else self._kept

    def _is_narrowed(self, op: Gemm) -> bool:
        """Whether the engine makes narrow factors for it (`parallel/fp8.py`): for outputs and input gradients of the layers' linears."""
        if self.precision not in NARROW:
            return False
        is_linear = not (op.groups > 1 or op.role.place in ("head", "router") or op.is_weight_gradient)
        return is_linear and not (op.n % NARROW_MULTIPLE or op.k % NARROW_MULTIPLE)

    def _cast(self, op: Gemm, products: str) -> float:
        """Other software casts the activations of a narrower product first, in both orders, and its weight gradient finds them cast. The
        engine casts both factors at every use; those of an input gradient need the weight the other way round, in 8 bits."""
        if products == self._kept:
            return 0.0
        if self.practice.products is None:
            turned = 2 * op.k * op.n if op.role.of_input else 0
            moved = NARROWED_BYTES * (op.m * op.k + op.k * op.n) + turned
            return moved / self.memory_bandwidth + 2 * NARROWING_STEPS * self._gap
        if op.is_weight_gradient:
            return 0.0
        return (self._size + 2) * op.m * op.k / self.memory_bandwidth

    def _attention(self, op: Attention) -> float:
        measured = self._measured_attention[op.backward]
        if measured:
            forward = op.flops * (2 / 5 if op.backward else 1)
            return op.flops / self._shared(measured, forward)
        if self.practice.attention in ("fused-softmax", "unfused"):
            return self._written_scores(op)
        constants = self.constants
        shares = constants.attention[self.practice.attention]
        share: float = (shares.backward if op.backward else shares.forward) * (
            shares.newer if "fp8" in self._peaks else 1.0
        )
        # A causal kernel computes whole blocks on the diagonal, and short sequences do not fill it.
        length = op.length / math.sqrt(op.share)
        share *= length / (length + constants.attention_fill)
        return op.flops / (share * self._matmul_rate(op.flops)) + self._gap

    def _written_scores(self, op: Attention) -> float:
        """Products over the whole square, and the passes over the scores between them."""
        constants = self.constants
        rows, columns = op.length // op.share, op.length
        maps = op.batch * op.heads
        wide = Gemm("scores", maps * rows, columns, op.head_dim, maps)
        narrow = Gemm("values", maps * rows, op.value_dim, columns, maps)
        products = 2 * (self.gemm(wide) + self.gemm(narrow)) if op.backward else self.gemm(wide) + self.gemm(narrow)
        passes: float = constants.score_passes[self.practice.attention]
        bytes_ = maps * rows * columns * self._size * passes * (1.5 if op.backward else 1.0)
        return products + bytes_ / self.memory_bandwidth + self._gap * passes / 2

    def host_seconds(self, ops: Sequence[Op], recomputed: bool) -> float:
        """What the host takes to start all of `ops`, and to save and restore the random state of a layer that is `recomputed`."""
        if not self.dispatch:
            return 0.0
        checkpoint = self.constants.checkpoint if recomputed and self.practice.whole_recompute else 0.0
        return checkpoint + self.dispatch * sum(self._launches(op) for op in ops)

    @cached_property
    def dispatch(self) -> float:
        """Seconds that the host takes to start one operator."""
        return self.constants.dispatch if self._hosted and not self.practice.compiled else 0.0

    def waited_seconds(self, ops: Sequence[Op]) -> float:
        """What starting `ops` takes where the host reads from the device among them, and starts none ahead."""
        return self.host_seconds(ops, False) if self.practice.waits else 0.0

    @cached_property
    def _gap(self) -> float:
        return self.constants.gap if self._hosted else 0.0

    @cached_property
    def _hosted(self) -> bool:
        """Whether the accelerator is apart from a host that starts its kernels: their gaps are in measured rates already, and a CPU
        has none."""
        return not self._measured_matmul and self.cluster.node.compute_slots is None

    def _launches(self, op: Op) -> float:
        """Kernels that the host starts for `op`."""
        if isinstance(op, Under):
            return 1 + sum(self._launches(work) for work in op.work)
        if isinstance(op, Gemm) and self._is_looped(op):
            return op.groups
        if isinstance(op, Gemm) and self.practice.products is None and self._is_narrowed(op):
            return 1 + 2 * NARROWING_STEPS / KERNELS
        if isinstance(op, Elementwise) and op.name == "norm" and not self.practice.fused_norms:
            return self.constants.norm_passes
        if isinstance(op, Attention) and self.practice.attention in ("fused-softmax", "unfused"):
            return (2 if op.backward else 1) * (2 + self.constants.score_passes[self.practice.attention] / 2)
        return 1

    def elementwise(self, op: Elementwise) -> float:
        if not self._hosted:
            return op.bytes / self.memory_bandwidth
        constants = self.constants
        passes = 1.0 if self.practice.compiled or op.name == "optimizer" else constants.passes
        if op.name == "norm" and not self.practice.fused_norms:
            passes = constants.norm_passes
        return op.bytes * passes / self.memory_bandwidth + self._gap

    @property
    def _peaks(self) -> dict[str, float]:
        return self.cluster.accelerator.peak_flops

    @property
    def peak_flops(self) -> float:
        """Dense peak of one accelerator in this precision, in bf16 where only linears are narrower. Raises UserError when the catalogue
        has none."""
        peaks = self._peaks
        if self.precision not in peaks:
            raise UserError(f"{self.cluster.accelerator.name} has no {self.precision} rate; it has {', '.join(peaks)}")
        return peaks[self._kept]

    @cached_property
    def memory_bandwidth(self) -> float:
        measured = self.cluster.measured
        if measured and measured.memory_bandwidth and self.active > 1:
            alone = self.cluster.accelerator.memory_bandwidth
            return min(alone, measured.memory_bandwidth * self.cluster.node.accelerators / self.active)
        accelerator = self.cluster.accelerator
        share = accelerator.memory_share or self.constants.memory_share
        return accelerator.memory_bandwidth * share / (self._share if self.active > 1 else 1.0)

    @cached_property
    def evidence(self) -> str:
        if self._measured_matmul:
            return f"measured: {self.cluster.measured.source}"  # type: ignore[union-attr]
        share = self.cluster.accelerator.matmul_share.get(self._kept)
        if share:
            return f"published: largest matmul {share:.0%} of peak, kernels fitted on published runs ({self.cluster.accelerator.source})"
        return f"formula: matmul at {self.constants.matmul_share:.0%} of peak, the usual share"

    @property
    def _share(self) -> float:
        """How many ranks share one compute slot when all are active."""
        node = self.cluster.node
        return max(1.0, node.accelerators / node.compute_slots) if node.compute_slots else 1.0

    def _matmul_rate(self, flops: float, precision: str | None = None) -> float:
        if self._measured_matmul and precision in (None, self._kept):
            return self._shared(self._measured_matmul, flops)
        key = precision or self._kept
        if key not in self._rates:
            self._rates[key] = self._rate(key)
        return self._rates[key]

    def _rate(self, precision: str) -> float:
        """FLOP/s of large products."""
        constants, accelerator = self.constants, self.cluster.accelerator
        if precision not in accelerator.peak_flops:
            precision = self._kept
        share = accelerator.matmul_share.get(precision, constants.matmul_share) * constants.sustained_share
        peak = accelerator.peak_flops[precision] if precision != self._kept else self.peak_flops
        return peak * share / (self._share if self.active > 1 else 1.0)

    def _shared(self, by_active: dict[int, list[tuple[float, float]]], flops: float) -> float:
        """The rate with `active` ranks at work, from those measured: a rank is never quicker than alone, and together they are
        no quicker than the most ranks that were measured."""
        if self.active in by_active:
            return interpolate(by_active[self.active], flops)
        fewest, most = min(by_active), max(by_active)
        return min(interpolate(by_active[fewest], flops), interpolate(by_active[most], flops) * most / self.active)

    @cached_property
    def _measured_matmul(self) -> dict[int, list[tuple[float, float]]]:
        """Active ranks to sorted (FLOPs, rate)."""
        out: dict[int, list[tuple[float, float]]] = {}
        for p in self.cluster.measured.matmul if self.cluster.measured else ():
            if p.precision == self._kept:
                out.setdefault(p.active, []).append((2.0 * p.m * p.n * p.k, p.flops_per_s))
        return {active: sorted(points) for active, points in out.items()}

    @cached_property
    def _measured_attention(self) -> dict[bool, dict[int, list[tuple[float, float]]]]:
        """Backward or not, to active ranks, to sorted (forward FLOPs, rate)."""
        out: dict[bool, dict[int, list[tuple[float, float]]]] = {False: {}, True: {}}
        for p in self.cluster.measured.attention if self.cluster.measured else ():
            if p.precision == self._kept:
                out[False].setdefault(p.active, []).append((p.flops, p.forward_flops_per_s))
                out[True].setdefault(p.active, []).append((p.flops, p.backward_flops_per_s))
        return {backward: {active: sorted(points) for active, points in by.items()} for backward, by in out.items()}


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines between points in log-log, flat beyond both ends. `points` sorted by x, all positive."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            weight = math.log(x / x0) / math.log(x1 / x0) if x1 > x0 else 1.0
            return math.exp(math.log(y0) * (1 - weight) + math.log(y1) * weight)
    return points[-1][1]
