"""Data parallel and ZeRO over flat buckets.

A rank's parameters live in a few flat tensors, planned by `schedule/buckets.py`; so do its gradients. What is kept whole
depends on the ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, section 5):

    stage   parameters   gradients   optimizer state   reduced
    0       whole        whole       whole             once a step
    1       whole        whole       1/N               once a step
    2       whole        1/N         1/N               every micro-batch: whole gradients are not kept between them
    3       1/N          1/N         1/N               every micro-batch; gathered for every pass (`parallel/units.py`)

A bucket is reduced as soon as the last of its gradients is ready, while backward goes on. Under hybrid sharding N is the
size of a group of neighbours, and the groups sum what they hold once a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.mesh import Mesh
from meshwright.schedule.buckets import Bucket
from meshwright.spec.layout import Precision
from meshwright.spec.shards import Shard

PARAMETER_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
GRADIENT_DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp8": torch.float32,
}

IN_FLIGHT = 2
"""Reductions of whole gradients under way at once, from ZeRO-2 on: more would keep more of them."""


class GradientSlot:
    """Where the gradient of one shard is kept until its bucket is reduced; a `Slot` of `parallel/linear.py`."""

    def __init__(self, bucket: FlatBucket, shard: Shard, offset: int):
        self.bucket, self.shard, self.offset = bucket, shard, offset
        self.empty = True

    @property
    def view(self) -> Tensor:
        flat = self.bucket.whole_gradients()
        return flat[self.offset : self.offset + self.shard.numel].view(self.shard.shape)

    def add(self, gradient: Tensor) -> None:
        if self.empty:
            self.view.copy_(gradient)
        else:
            self.view.add_(gradient)
        self._added()

    def add_product(self, grad_TO: Tensor, x_TI: Tensor) -> None:
        _product_into(self.view, grad_TO, x_TI, overwrite=self.empty)
        self._added()

    def add_products(self, grad_nO: Tensor, x_nI: Tensor, counts: Sequence[int]) -> None:
        for view, grad, x in zip(self.view, grad_nO.split(counts), x_nI.split(counts), strict=True):
            _product_into(view, grad, x, overwrite=self.empty)
        self._added()

    def _added(self) -> None:
        self.empty = False
        self.bucket.added()


def _product_into(view: Tensor, grad_TO: Tensor, x_TI: Tensor, *, overwrite: bool) -> None:
    """view_OI = or += grad_TO^T x_TI. The product of half-precision factors is added in the gradient's own precision."""
    if view.dtype != grad_TO.dtype:
        product = grad_TO.t() @ x_TI
        view.copy_(product) if overwrite else view.add_(product)
    elif overwrite:
        torch.mm(grad_TO.t(), x_TI, out=view)
    else:
        view.addmm_(grad_TO.t(), x_TI)


class FlatBucket:
    """The memory of one bucket on this rank.

    `weights` is what the optimizer steps: the part of the parameters that this rank updates, or a fp32 master copy of it when
    the parameters are narrower. `own_parameters` is that part in the parameters' dtype, `own_gradients` its gradient.
    """

    def __init__(self, plan: Bucket, mesh: Mesh, state: DataParallel):
        self.plan, self.state = plan, state
        prefix = "expert_" if plan.routed else ""
        self.shard, self.replicate = mesh[f"{prefix}shard"], mesh[f"{prefix}replicate"]
        zero, precision = mesh.layout.zero, mesh.layout.precision
        self.dtype, self.gradient_dtype, self.device = PARAMETER_DTYPE[precision], GRADIENT_DTYPE[precision], mesh.device
        self.keeps_parameters = plan.unit is None or self.shard.size == 1
        self.keeps_gradients = zero < 2 or self.shard.size == 1
        length = plan.numel // self.shard.size
        self.owned = slice(length * self.shard.index, length * (self.shard.index + 1))
        if self.keeps_parameters:
            self.parameters = self._zeros(plan.numel, self.dtype)
            self.own_parameters = self.parameters[self.owned]
        else:
            self.parameters = self.own_parameters = self._zeros(length, self.dtype)
        if self.keeps_gradients:
            self.gradients = self._zeros(plan.numel, self.gradient_dtype)
            self.own_gradients = self.gradients[self.owned]
        else:
            self.gradients = self.own_gradients = self._zeros(length, self.gradient_dtype)
        own = self.own_parameters
        self.weights = nn.Parameter(own.to(self.gradient_dtype) if self.dtype != self.gradient_dtype else own)
        self.weights.grad = self.own_gradients
        self.slots = [GradientSlot(self, s, at) for s, at in zip(plan.shards, plan.offsets, strict=True)]
        self.uses = 0
        """Gradients that one micro-batch adds: one for each place in the model that uses a parameter."""
        self._missing = 0
        self._transient: Tensor | None = None
        self._reduced = False

    @property
    def has_master(self) -> bool:
        return self.dtype != self.gradient_dtype

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(global name, the shard's tensor) for each shard, as views of a whole flat tensor."""
        for shard, offset in zip(self.plan.shards, self.plan.offsets, strict=True):
            yield shard.name, flat[offset : offset + shard.numel].view(shard.shape)

    def fill(self, shard: Shard, offset: int, value: Tensor) -> None:
        """Set the part of `shard` that this rank keeps."""
        start = 0 if self.keeps_parameters else self.owned.start
        low, high = max(start, offset), min(start + len(self.parameters), offset + shard.numel)
        if low < high:
            self.parameters[low - start : high - start] = value.reshape(-1)[low - offset : high - offset]

    def begin_step(self, micro_batches: int) -> None:
        """Forget the gradients of the step before: the first ones to come overwrite them, which saves clearing them."""
        self._reduced = False
        self._open(self.uses * (micro_batches if self.keeps_gradients else 1))

    def whole_gradients(self) -> Tensor:
        """All gradients of the bucket: kept, or there until they are reduced."""
        if self.keeps_gradients:
            return self.gradients
        if self._transient is None:
            self._transient = self.state.buffers.take(self.plan.numel, self.gradient_dtype, self.device)
            for gap in self.plan.gaps:  # they count in the gradient norm
                self._transient[gap].zero_()
        return self._transient

    def added(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self.state.ready(self)

    @property
    def is_complete(self) -> bool:
        return self._missing == 0

    @property
    def is_owing(self) -> bool:
        """Whether something came in since the last reduction, or there was none."""
        return not (self._reduced and all(slot.empty for slot in self.slots))

    def clear_missing(self) -> None:
        """Zero the gradients that nothing has been added to."""
        for slot in self.slots:
            if slot.empty:
                slot.view.zero_()
                slot.empty = False

    def reduce(self) -> Reduction:
        """Start to sum over the data-parallel ranks."""
        self.clear_missing()
        whole, first = self.whole_gradients(), not self._reduced
        self._reduced = True
        if self.keeps_gradients:
            if self.shard.size > 1:
                return Reduction(self.shard.reduce_scatter(self.own_gradients, whole, wait=False))
            return Reduction(self.replicate.all_reduce(whole, wait=False))
        self._transient = None
        self._open(self.uses)
        if first:
            handle = self.shard.reduce_scatter(self.own_gradients, whole, wait=False)
            return Reduction(handle, lambda: self.state.buffers.give(whole))
        part = self.state.buffers.take(len(self.own_gradients), self.gradient_dtype, self.device)

        def add() -> None:
            self.own_gradients.add_(part)
            self.state.buffers.give(part)
            self.state.buffers.give(whole)

        return Reduction(self.shard.reduce_scatter(part, whole, wait=False), add)

    def _open(self, expected: int) -> None:
        self._missing = expected
        for slot in self.slots:
            slot.empty = True

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)


class Reduction:
    """A reduction under way, and what is to be done when it is through."""

    def __init__(self, handle: Any, then: Any = None):
        self.handle, self.then = handle, then

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
        if self.then is not None:
            self.then()


class Buffers:
    """Flat tensors that come and go, kept for the next of the same size: fresh memory costs page faults on a CPU."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised."""
        free = self._free.setdefault((numel, dtype), [])
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def give(self, buffer: Tensor) -> None:
        self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)


class DataParallel:
    """Reduces gradients over the data-parallel ranks and keeps their parameters equal."""

    def __init__(self, plan: tuple[Bucket, ...], mesh: Mesh):
        self.mesh = mesh
        self.buffers = Buffers()
        self.buckets = [FlatBucket(bucket, mesh, self) for bucket in plan]
        self._next = 0
        self._pending: deque[Reduction] = deque()

    def attach(self, parameters: dict[str, nn.Parameter], uses: dict[str, int], gradients: WeightGradients) -> None:
        """Receive the gradients of `parameters` (by global name), each added `uses` times in a micro-batch: from
        `gradients`, or from autograd."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                parameter = parameters[slot.shard.name]
                gradients.keep(parameter, slot)
                parameter.register_post_accumulate_grad_hook(_move_gradient(slot))
                bucket.uses += uses[slot.shard.name]

    def begin_step(self, micro_batches: int) -> None:
        self._next = 0
        for bucket in self.buckets:
            bucket.begin_step(micro_batches)

    def ready(self, bucket: FlatBucket) -> None:
        """All gradients of `bucket` are in. Those that are kept whole are reduced in their planned order, which is the same on every
        rank, whatever became ready first; the others in the order of backward."""
        if not bucket.keeps_gradients:
            self._reduce(bucket)
            return
        while self._next < len(self.buckets) and self.buckets[self._next].is_complete:
            self._reduce(self.buckets[self._next])
            self._next += 1

    def finish_step(self) -> None:
        """Reduce what is left, wait, and sum the gradients of which each replica holds a part."""
        for index, bucket in enumerate(self.buckets):  # parameters that nothing in this step depended on
            if bucket.keeps_gradients:
                if index >= self._next:
                    self._reduce(bucket)
            elif bucket.is_owing:
                self._reduce(bucket)
        self._next = len(self.buckets)
        while self._pending:
            self._pending.popleft().wait()
        for bucket in self.buckets:
            if bucket.shard.size > 1:
                bucket.replicate.all_reduce(bucket.own_gradients)
            if bucket.plan.partial and bucket.plan.replicas:
                self.mesh[bucket.plan.replicas].all_reduce(bucket.own_gradients)

    def publish(self) -> None:
        """Make the updated weights the parameters of every data-parallel rank."""
        gathers = []
        for bucket in self.buckets:
            if bucket.has_master:
                bucket.own_parameters.copy_(bucket.weights.detach())
            if bucket.keeps_parameters and bucket.shard.size > 1:
                gathers.append(bucket.shard.all_gather(bucket.parameters, bucket.own_parameters, wait=False))
        for handle in gathers:
            handle.wait()

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm: every element of the model is counted by exactly one rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for bucket in self.buckets:
            if bucket.replicate.index == 0 and self.mesh.owns(bucket.plan.replicas):
                total += torch.linalg.vector_norm(bucket.own_gradients).double() ** 2
        return total

    def scale_gradients(self, factor: float) -> None:
        for bucket in self.buckets:
            bucket.own_gradients.mul_(factor)

    def whole_gradients(self) -> Iterator[tuple[Shard, Tensor]]:
        """Each shard with its finished gradient, gathered from the ranks that hold parts of it. Every rank calls this.

        For checks: it is not a part of a step, and not in the ledger.
        """
        for bucket in self.buckets:
            flat = bucket.own_gradients
            if bucket.shard.size > 1:
                flat = bucket.shard.gathered_outside_ledger(flat)
            by_name = {shard.name: shard for shard in bucket.plan.shards}
            for name, view in bucket.views(flat):
                yield by_name[name], view.clone()

    def _reduce(self, bucket: FlatBucket) -> None:
        while not bucket.keeps_gradients and len(self._pending) >= IN_FLIGHT:
            self._pending.popleft().wait()
        self._pending.append(bucket.reduce())


def _move_gradient(slot: GradientSlot) -> Any:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:  # autograd also calls for weights whose gradient `linear` has put in the slot
            slot.add(parameter.grad)
            parameter.grad = None

    return move
