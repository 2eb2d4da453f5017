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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.bucket import AdamState, Borrowed, Buffers, FlatBucket, Reduction
from meshwright.parallel.linear import WeightGradients
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.offload import Offload
from meshwright.parallel.slots import GradientSlot
from meshwright.schedule.buckets import Bucket
from meshwright.spec.shards import Shard

IN_FLIGHT = 2
"""Reductions of whole gradients under way at once, from ZeRO-2 on: more would keep more of them."""

NORM_BLOCK = 4096
"""Elements whose squares are added up in the precision of the gradients."""


class DataParallel:
    """Reduces gradients over the data-parallel ranks and keeps their parameters equal."""

    def __init__(self, plan: tuple[Bucket, ...], mesh: Mesh, offload: Offload | None = None):
        self.mesh, self.offload = mesh, offload
        self.buffers = Buffers()
        self.buckets = [FlatBucket(bucket, index, mesh, self) for index, bucket in enumerate(plan)]
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

    def close(self) -> None:
        """End what moves offloaded state, and let go of its files."""
        if self.offload is not None:
            self.offload.close()

    def states(self) -> Iterator[tuple[FlatBucket, AdamState]]:
        """Each bucket's weights and moments in turn, to be updated in place before the next is asked for.

        What is away is read one bucket ahead and written one bucket behind; all is written when the last has been asked for.
        """
        if self.offload is None:
            for bucket in self.buckets:
                state = bucket.state_at_rest
                yield bucket, state
                bucket.adopt(state.weights)
            return
        slabs = self.offload.in_turn(max(bucket.borrowed_bytes for bucket in self.buckets))
        borrowed: list[Borrowed] = []
        for index in range(len(self.buckets) + 1):
            if index >= len(slabs):
                borrowed[index - len(slabs)].wait()
            if index < len(self.buckets):
                borrowed.append(self.buckets[index].borrow(slabs[index % len(slabs)]))
            if index > 0:
                here = borrowed[index - 1]
                here.wait()
                yield here.bucket, here.state
                here.give_back()
        for left in borrowed[-len(slabs) :]:
            left.wait()

    def adopt_weights(self) -> None:
        """After weights have been put where they are kept: make them the parameters."""
        for bucket in self.buckets:
            bucket.adopt(bucket.state_at_rest.weights)
        self.publish()

    def publish(self) -> None:
        """Make the updated weights the parameters of every data-parallel rank."""
        gathers = [
            bucket.shard.all_gather(bucket.parameters, bucket.own_parameters, wait=False)
            for bucket in self.buckets
            if bucket.keeps_parameters and bucket.shard.size > 1
        ]
        for handle in gathers:
            handle.wait()

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm: every element of the model is counted by exactly one rank."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for bucket in self.buckets:
            if bucket.replicate.index == 0 and self.mesh.owns(bucket.plan.replicas):
                total += squared_norm(bucket.own_gradients, bucket.update_dtype)
        return total

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


def squared_norm(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a vector, in fp64, squared in `dtype`. On the CPU PyTorch adds up a norm in fp32 one element after the other in each lane, and is
    off by 1e-3 for 16 million; so the sums are of blocks, and added up in fp64, which costs nothing."""
    whole = len(flat) - len(flat) % NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1, dtype=dtype).double()
    return blocks.square().sum() + torch.linalg.vector_norm(flat[whole:], dtype=dtype).double().square()


def _move_gradient(slot: GradientSlot) -> Any:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:  # autograd also calls for weights whose gradient `linear` has put in the slot
            slot.add(parameter.grad)
            parameter.grad = None

    return move
