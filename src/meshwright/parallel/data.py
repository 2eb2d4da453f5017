"""Data parallel and ZeRO-1 over flat buckets.

A rank's parameters live in a few flat tensors, planned by `schedule/buckets.py`; so do its gradients. A bucket is reduced
as soon as its last gradient of the step is ready, while backward goes on. Under ZeRO-1 (Rajbhandari et al. 2020,
arXiv 1910.02054, section 5.1) each rank receives and updates 1/dp of every bucket, and gathers the rest afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.mesh import Mesh
from meshwright.schedule.buckets import Bucket
from meshwright.spec.layout import Precision

PARAMETER_DTYPE: dict[Precision, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
GRADIENT_DTYPE: dict[Precision, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


class FlatBucket:
    """The memory of one bucket on this rank: parameters, gradients, and the part that this rank updates.

    `weights` is what the optimizer steps: a view of the parameters, or a fp32 master copy of them when they are bf16.
    """

    def __init__(self, plan: Bucket, mesh: Mesh):
        self.plan = plan
        precision = mesh.layout.precision
        self.parameters = torch.zeros(plan.numel, dtype=PARAMETER_DTYPE[precision], device=mesh.device)
        self.gradients = torch.zeros(plan.numel, dtype=GRADIENT_DTYPE[precision], device=mesh.device)
        cuts = mesh.layout.state_shards
        length = plan.numel // cuts
        start = length * (mesh["dp"].index if cuts > 1 else 0)
        self.owned = slice(start, start + length)
        own = self.parameters[self.owned]
        self.weights = nn.Parameter(own if own.dtype == self.gradients.dtype else own.to(self.gradients.dtype))
        self.weights.grad = self.gradients[self.owned]

    @property
    def has_master(self) -> bool:
        return self.weights.dtype != self.parameters.dtype

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(global name, the shard's tensor) for each shard, as views of `flat`."""
        for shard, offset in zip(self.plan.shards, self.plan.offsets, strict=True):
            yield shard.name, flat[offset : offset + shard.numel].view(shard.shape)


class DataParallel:
    """Reduces gradients over dp and keeps the parameters of all dp ranks equal."""

    def __init__(self, plan: tuple[Bucket, ...], mesh: Mesh):
        self.mesh = mesh
        self.buckets = [FlatBucket(bucket, mesh) for bucket in plan]
        self._missing = [0] * len(plan)
        self._empty: dict[str, Tensor] = {}
        self._next = 0
        self._pending: list[Any] = []
        self._reducing = False

    def attach(self, parameters: dict[str, nn.Parameter]) -> None:
        """Watch the gradients of `parameters` (global names), whose memory must be this object's buckets."""
        for index, bucket in enumerate(self.buckets):
            for name, view in bucket.views(bucket.gradients):
                parameters[name].register_post_accumulate_grad_hook(self._hook(index, name, view))

    def begin_step(self) -> None:
        """Forget the gradients of the step before: the first ones to come overwrite them, which saves clearing them."""
        self._empty = {name: view for bucket in self.buckets for name, view in bucket.views(bucket.gradients)}
        self._missing = [len(bucket.plan.shards) for bucket in self.buckets]
        self._next = 0
        self._reducing = False

    def begin_last_micro_batch(self) -> None:
        """From here on, a bucket whose gradients are all in is reduced at once."""
        self._reducing = True

    def finish_step(self) -> None:
        """Wait for the reductions; sum the gradients of which each replica holds a part."""
        for view in self._empty.values():  # parameters that nothing in this step depended on
            view.zero_()
        while self._next < len(self.buckets):
            self._reduce_next()
        for handle in self._pending:
            handle.wait()
        self._pending.clear()
        for bucket in self.buckets:
            if bucket.plan.partial and bucket.plan.replicas:
                self.mesh[bucket.plan.replicas].all_reduce(bucket.weights.grad)

    def publish(self) -> None:
        """Make the updated weights the parameters of every dp rank."""
        group = self.mesh["dp"]
        gathers = []
        for bucket in self.buckets:
            own = bucket.parameters[bucket.owned]
            if bucket.has_master:
                own.copy_(bucket.weights.detach())
            if self.mesh.layout.state_shards > 1:
                gathers.append(group.all_gather(bucket.parameters, own, wait=False))
        for handle in gathers:
            handle.wait()

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm: every element of the model is counted by exactly one rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        shared = self.mesh.layout.state_shards == 1 and self.mesh["dp"].index > 0
        for bucket in self.buckets:
            if not shared and self.mesh.owns(bucket.plan.replicas):
                total += torch.linalg.vector_norm(bucket.weights.grad).double() ** 2
        return total

    def scale_gradients(self, factor: float) -> None:
        for bucket in self.buckets:
            bucket.weights.grad.mul_(factor)  # type: ignore[union-attr]

    def _hook(self, index: int, name: str, view: Tensor) -> Any:
        def ready(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self._empty.pop(name, None) is None:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
            parameter.grad = None
            if self._reducing:
                self._missing[index] -= 1
                while self._next < len(self.buckets) and self._missing[self._next] == 0:
                    self._reduce_next()

        return ready

    def _reduce_next(self) -> None:
        """Reduce buckets in their planned order, which is the same on every rank, whatever became ready first."""
        bucket, group = self.buckets[self._next], self.mesh["dp"]
        self._next += 1
        if group.size == 1:
            return
        if self.mesh.layout.state_shards > 1:
            handle = group.reduce_scatter(bucket.gradients[bucket.owned], bucket.gradients, wait=False)
        else:
            handle = group.all_reduce(bucket.gradients, wait=False)
        self._pending.append(handle)
