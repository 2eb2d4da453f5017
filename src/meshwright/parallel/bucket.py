"""The memory of one bucket on a rank: parameters, gradients and optimizer state as flat tensors, and where gradients are put.

What is kept whole depends on the ZeRO stage (`parallel/data.py`), the dtypes on the layout (`spec/precision.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from meshwright.parallel.mesh import Mesh
from meshwright.parallel.offload import Offload, Record
from meshwright.parallel.slots import GradientSlot
from meshwright.schedule.buckets import Bucket
from meshwright.spec.layout import Offload as OffloadWhat
from meshwright.spec.layout import Precision
from meshwright.spec.precision import StateDtypes
from meshwright.spec.shards import Shard

if TYPE_CHECKING:
    from meshwright.parallel.data import DataParallel

DTYPE: dict[Precision, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


class AdamState(NamedTuple):
    """What AdamW updates: flat tensors of the elements that a rank owns, in the dtype of its arithmetic."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class FlatBucket:
    """The memory of one bucket on this rank.

    `own_parameters` is the part of the parameters that this rank updates, in the dtype that they are kept in, `own_gradients` its
    gradient. `master` is a wider copy of the former, where they are narrower than the arithmetic of the optimizer.

    What the layout offloads is the record `away` [master weights if any, both moments] and, under offload:all, `away_parameters`;
    then the tensors named above are where these rest, on the host.
    """

    def __init__(self, plan: Bucket, index: int, mesh: Mesh, state: DataParallel):
        self.plan, self.index, self.state, self.device = plan, index, state, mesh.device
        prefix = "expert_" if plan.routed else ""
        self.shard, self.replicate = mesh[f"{prefix}shard"], mesh[f"{prefix}replicate"]
        dtypes = StateDtypes.of(mesh.layout, cast=plan.is_cast)
        self.dtype, self.compute_dtype = DTYPE[dtypes.parameter], DTYPE[dtypes.compute]
        self.gradient_dtype, self.update_dtype = DTYPE[dtypes.gradient], DTYPE[dtypes.update]
        self.away, self.away_parameters = self._records(dtypes, state.offload, mesh.layout.offload)
        self.keeps_parameters = (plan.unit is None or self.shard.size == 1) and self.away_parameters is None
        self.keeps_gradients = mesh.layout.zero < 2 or self.shard.size == 1
        length = plan.owned
        self.owned = slice(length * self.shard.index, length * (self.shard.index + 1))
        if self.keeps_parameters:
            self.parameters = self._zeros(plan.numel, self.dtype)
            self.own_parameters = self.parameters[self.owned]
        else:
            self.parameters = self.own_parameters = (
                self._zeros(length, self.dtype) if self.away_parameters is None else self.away_parameters.kept
            )
        if self.keeps_gradients:
            self.gradients = self._zeros(plan.numel, self.gradient_dtype)
            self.own_gradients = self.gradients[self.owned]
        else:
            self.gradients = self.own_gradients = self._zeros(length, self.gradient_dtype)
        self.master: Tensor | None = None
        self._moments: tuple[Tensor, Tensor] | None = None
        if self.away is not None:
            *master, first, second = self.away.kept
            self.master, self._moments = master[0] if master else None, (first, second)
        elif dtypes.has_master:
            self.master = self._zeros(length, self.update_dtype)
        self.slots = [GradientSlot(self, s, at) for s, at in zip(plan.shards, plan.offsets, strict=True)]
        self.uses = 0
        """Gradients that one micro-batch adds: one for each place in the model that uses a parameter."""
        self._missing = 0
        self._transient: Tensor | None = None
        self._reduced = False

    @property
    def state_at_rest(self) -> AdamState:
        """Weights and moments where they are kept, moments of zero when no step has been taken."""
        if self._moments is None:
            length = len(self.own_parameters)
            self._moments = self._zeros(length, self.update_dtype), self._zeros(length, self.update_dtype)
        return AdamState(self.own_parameters if self.master is None else self.master, *self._moments)

    @property
    def parameter_bytes(self) -> int:
        """Of parameters that this rank's device holds between uses."""
        return self.parameters.nbytes if self.away_parameters is None else 0

    @property
    def optimizer_bytes(self) -> int:
        """Of a master copy and of moments that this rank's device holds."""
        if self.away is not None:
            return 0
        held = [t for t in (self.master, *(self._moments or ())) if t is not None]
        return sum(t.nbytes for t in held)

    @property
    def is_ready_to_use(self) -> bool:
        """Whether what is kept is what is computed with; else it is brought, unit by unit (`parallel/units.py`)."""
        return self.keeps_parameters and not self.plan.is_cast

    def adopt(self, weights: Tensor) -> None:
        """After a step: what this rank keeps of the parameters becomes the updated `weights`."""
        if self.master is not None:
            self.own_parameters.copy_(weights)

    def update_gradients(self, factor: float) -> Tensor:
        """This rank's gradients, `factor` times, in the optimizer's dtype; in place where they are in it."""
        if self.gradient_dtype == self.update_dtype:
            return self.own_gradients if factor == 1.0 else self.own_gradients.mul_(factor)
        return self.own_gradients.to(self.update_dtype).mul_(factor)

    @property
    def borrowed_bytes(self) -> int:
        """Of what `borrow` puts on the device."""
        return sum(record.nbytes for record in (self.away, self.away_parameters) if record is not None)

    def borrow(self, slab: Tensor) -> Borrowed:
        """Start to read into `slab` [bytes] what is away of the weights and moments."""
        return Borrowed(self, slab)

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

    def _records(
        self, dtypes: StateDtypes, offload: Offload | None, what: OffloadWhat
    ) -> tuple[Record | None, Record | None]:
        if offload is None:
            return None, None
        name, owned = f"bucket-{self.index:04d}", self.plan.owned
        away = offload.record(f"{name}-optimizer", (2 + dtypes.has_master, owned), self.update_dtype)
        if what != "all" or self.plan.unit is None:
            return away, None
        return away, offload.record(f"{name}-parameters", (owned,), self.dtype)

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)


class Borrowed:
    """Weights and moments of a bucket on the device, on their way there, or on their way back."""

    def __init__(self, bucket: FlatBucket, slab: Tensor):
        away, parameters = bucket.away, bucket.away_parameters
        assert away is not None
        self.bucket, self.away, self.away_parameters = bucket, away, parameters
        self.rows = slab[: away.nbytes].view(bucket.update_dtype).view(away.kept.shape)
        self._moves = [away.read(self.rows)]
        *master, first, second = self.rows
        self.parameters = bucket.own_parameters
        if parameters is not None:
            self.parameters = slab[away.nbytes : away.nbytes + parameters.nbytes].view(bucket.dtype)
            if not master:
                self._moves.append(parameters.read(self.parameters))
        self.state = AdamState(master[0] if master else self.parameters, first, second)

    def wait(self) -> None:
        """Until they have arrived; or, after `give_back`, until they are where they rest."""
        for move in self._moves:
            move.result()

    def give_back(self) -> None:
        """Start to write the updated state, and what follows from it."""
        if self.bucket.master is not None:
            self.parameters.copy_(self.state.weights)
        self._moves = [self.away.write(self.rows)]
        if self.away_parameters is not None:
            self._moves.append(self.away_parameters.write(self.parameters))


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
