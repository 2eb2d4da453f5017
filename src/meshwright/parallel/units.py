"""ZeRO-3: parameters that are whole only while they are used.

A unit is a part of the model (a layer, the embedding, the head) whose parameters are gathered together, before its forward and
again before its backward, and let go after each (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3; Zhao et al. 2023,
arXiv 2304.11277, section 4.2). A bucket of `parallel/data.py` is gathered into one flat buffer whose views are the parameters, so
nothing is copied. While a unit runs, the next one's parameters are already on their way.

Calls of a micro-batch: one all-gather of each bucket for forward and one for backward; the embedding needs none for backward,
nor does the last unit without a pipeline, whose backward follows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.models.decoder import Decoder
from meshwright.parallel.data import DataParallel, FlatBucket


class Unit:
    """Buckets that are gathered together, and the parameters whose memory they are."""

    def __init__(self, buckets: list[FlatBucket], parameters: dict[str, nn.Parameter]):
        self.buckets, self.parameters = buckets, parameters
        self._arriving: list[tuple[FlatBucket, Tensor, Any]] = []
        self._here: list[tuple[FlatBucket, Tensor]] = []

    def prefetch(self) -> None:
        """Start to gather, unless that is under way or done."""
        if self._here or self._arriving:
            return
        for bucket in self.buckets:
            whole = bucket.state.buffers.take(bucket.plan.numel, bucket.dtype, bucket.device)
            self._arriving.append((bucket, whole, bucket.shard.all_gather(whole, bucket.own_parameters, wait=False)))

    def gather(self) -> None:
        """From here on the parameters are whole."""
        self.prefetch()
        for bucket, whole, handle in self._arriving:
            handle.wait()
            self._here.append((bucket, whole))
            for name, view in bucket.views(whole):
                self.parameters[name].data = view
        self._arriving.clear()

    def release(self) -> None:
        """From here on they are not."""
        for bucket, whole in self._here:
            for slot in bucket.slots:
                self.parameters[slot.shard.name].data = absent(slot.shard.shape, bucket.dtype, bucket.device)
            bucket.state.buffers.give(whole)
        self._here.clear()


def absent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for a parameter that is not here: its shape without its memory. Whoever reads it by mistake gets NaN."""
    return torch.full((1,), float("nan"), dtype=dtype, device=device).expand(shape)


def shard_parameters(
    decoder: Decoder, state: DataParallel, parameters: dict[str, nn.Parameter], *, last_stays: bool
) -> None:
    """Gather and release the parameters of `decoder` unit by unit, wherever ZeRO-3 cuts them.

    `last_stays`: the backward of the last unit follows its forward at once.
    """
    units = _units(state, parameters)
    modules: list[tuple[str, nn.Module | None]] = [("embedding", decoder.embedding)]
    modules += [(f"layers.{name}", layer) for name, layer in decoder.layers.items()]
    modules.append(("embedding" if decoder.model.tied else "head", decoder.head))
    used = [(units[name], module) for name, module in modules if module is not None and name in units]
    for index, (unit, module) in enumerate(used):
        before = used[index - 1][0] if index > 0 and not isinstance(used[index - 1][1], type(decoder.embedding)) else None
        after = used[index + 1][0] if index + 1 < len(used) else None
        stays = last_stays and after is None
        module.forward = _Gathered(module.forward, unit, before, after, stays=stays)  # type: ignore[method-assign, assignment]


def _units(state: DataParallel, parameters: dict[str, nn.Parameter]) -> dict[str, Unit]:
    held: dict[str, list[FlatBucket]] = {}
    for bucket in state.buckets:
        if not bucket.keeps_parameters:
            assert bucket.plan.unit is not None
            held.setdefault(bucket.plan.unit, []).append(bucket)
    return {name: Unit(buckets, parameters) for name, buckets in held.items()}


class _Gathered:
    """A module's forward with its unit gathered around it, in forward and in backward."""

    def __init__(self, forward: Callable[..., Tensor], unit: Unit, before: Unit | None, after: Unit | None, *, stays: bool):
        self.forward, self.unit, self.before, self.after, self.stays = forward, unit, before, after, stays

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.unit.gather()
        if self.after is not None:
            self.after.prefetch()
        y = _AfterBackward.apply(x, self.unit) if x.requires_grad else x
        y = self.forward(y, *rest)
        if x.requires_grad:
            y = _BeforeBackward.apply(y, self.unit, self.before)
        if not (self.stays and y.requires_grad):
            self.unit.release()
        return y


class _AfterBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Unit) -> Tensor:
        ctx.unit = unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.unit.release()
        return grad, None


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, unit: Unit, before: Unit | None) -> Tensor:
        ctx.unit, ctx.before = unit, before
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.unit.gather()
        if ctx.before is not None:
            ctx.before.prefetch()
        return grad, None, None
