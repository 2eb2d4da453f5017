"""Parameters that are ready for use only while they are used: those that ZeRO-3 cuts, that are offloaded, or kept in another dtype.

A unit is a part of the model (a layer, the embedding, the head) whose parameters are brought together, before its forward and
again before its backward, and let go after each (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3; Zhao et al. 2023,
arXiv 2304.11277, section 4.2). A bucket of `parallel/bucket.py` is gathered, or the unit's part of it cast, into one flat buffer
whose views are the parameters, so nothing is copied twice. While a unit runs, the next one's parameters are already on their way.

Calls of a micro-batch under ZeRO-3: one all-gather of each bucket for forward and one for backward; the embedding needs none for
backward, nor does the last unit without a pipeline, whose backward follows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshwright.models.decoder import Decoder
from meshwright.parallel.bucket import FlatBucket
from meshwright.parallel.data import DataParallel
from meshwright.schedule.buckets import AHEAD, unit_of
from meshwright.spec.shards import Shard


class Part:
    """What a unit has of one bucket: the shards that lie in `span` of it."""

    def __init__(self, bucket: FlatBucket, span: slice, shards: list[tuple[Shard, int]]):
        self.bucket, self.span, self.shards = bucket, span, shards
        self._reading: tuple[Tensor, Future[None]] | None = None

    @property
    def away_bytes(self) -> int:
        """Of this rank's part, where it is offloaded."""
        return self.bucket.away_parameters.nbytes if self.bucket.away_parameters is not None else 0

    def read(self, slab: Tensor) -> None:
        """Start to read this rank's part into `slab` [away_bytes]."""
        assert self.bucket.away_parameters is not None
        own = slab.view(self.bucket.dtype)
        self._reading = own, self.bucket.away_parameters.read(own)

    def start(self, whole: Tensor) -> Arrival | None:
        """Make `whole` the parameters, in the dtype that they are computed in. Returns what to wait on, or None.

        What is gathered is cast before it is sent, which halves the bytes of the message (as FSDP2's
        MixedPrecisionPolicy.param_dtype does).
        """
        bucket = self.bucket
        if bucket.keeps_parameters:
            whole.copy_(bucket.parameters[self.span])
            return None
        own = bucket.own_parameters
        if self._reading is not None:
            (own, reading), self._reading = self._reading, None
            reading.result()
        if bucket.shard.size == 1:
            whole.copy_(own)
            return None
        own = own.to(bucket.compute_dtype)
        return Arrival(bucket.shard.all_gather(whole, own, wait=False), own)

    def views(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(global name, the shard's tensor)."""
        for shard, offset in self.shards:
            at = offset - self.span.start
            yield shard.name, whole[at : at + shard.numel].view(shard.shape)


class Arrival(NamedTuple):
    """An all-gather under way, and its input, which must live until then."""

    handle: Any
    own: Tensor


class Unit:
    """Parts of buckets that are brought together, and the parameters whose memory they are."""

    def __init__(self, parts: list[Part], parameters: dict[str, nn.Parameter], state: DataParallel):
        self.parts, self.parameters, self.buffers, self.offload = parts, parameters, state.buffers, state.offload
        self._slab: Tensor | None = None
        self._arriving: dict[Part, tuple[Tensor, Arrival | None]] = {}
        self._here: list[tuple[Part, Tensor]] = []

    @property
    def away_bytes(self) -> int:
        return sum(part.away_bytes for part in self.parts)

    def fetch(self) -> None:
        """Start to read what is offloaded, unless that is under way or done."""
        if self.away_bytes and self._slab is None and not self._here:
            assert self.offload is not None
            self._slab, at = self.offload.take_ahead(), 0
            for part in self.parts:
                part.read(self._slab[at : at + part.away_bytes])
                at += part.away_bytes

    def prefetch(self) -> None:
        """Start to gather, unless that is under way or done. A cast alone would gain nothing by it."""
        if not self._here and not self._arriving:
            self.fetch()
            self._start([part for part in self.parts if not part.bucket.keeps_parameters])

    def bring(self) -> None:
        """From here on the parameters are whole."""
        if self._here:
            return
        self.prefetch()
        self._start([part for part in self.parts if part.bucket.keeps_parameters])
        for part, (whole, arrival) in self._arriving.items():
            if arrival is not None:
                arrival.handle.wait()
            self._here.append((part, whole))
            for name, view in part.views(whole):
                self.parameters[name].data = view
        self._arriving.clear()
        if self._slab is not None and self.offload is not None:
            self.offload.give_ahead(self._slab)
            self._slab = None

    def release(self) -> None:
        """From here on they are not."""
        for part, whole in self._here:
            for shard, _ in part.shards:
                self.parameters[shard.name].data = absent(shard.shape, part.bucket.compute_dtype, part.bucket.device)
            self.buffers.give(whole)
        self._here.clear()

    def _start(self, parts: list[Part]) -> None:
        for part in parts:
            numel = part.span.stop - part.span.start
            whole = self.buffers.take(numel, part.bucket.compute_dtype, part.bucket.device)
            self._arriving[part] = whole, part.start(whole)


def absent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for a parameter that is not here: its shape without its memory. Whoever reads it by mistake gets NaN."""
    return torch.full((1,), float("nan"), dtype=dtype, device=device).expand(shape)


def bring_parameters(
    decoder: Decoder, state: DataParallel, parameters: dict[str, nn.Parameter], *, last_stays: bool
) -> None:
    """Bring and release the parameters of `decoder` unit by unit, wherever they are cut or kept in another dtype.

    `last_stays`: the backward of the last unit follows its forward at once.
    """
    units = _units(state, parameters)
    modules: list[tuple[str, nn.Module | None]] = [("embedding", decoder.embedding)]
    modules += [(f"layers.{name}", layer) for name, layer in decoder.layers.items()]
    modules.append(("embedding" if decoder.model.tied else "head", decoder.head))
    used = [(units[name], module) for name, module in modules if module is not None and name in units]
    for index, (unit, module) in enumerate(used):
        # The embedding needs no parameters for its backward.
        before = [u for u, m in reversed(used[:index]) if not isinstance(m, type(decoder.embedding))][:AHEAD]
        after = [u for u, _ in used[index + 1 :]][:AHEAD]
        stays = last_stays and not after
        module.forward = _Brought(module.forward, unit, before, after, stays=stays)  # type: ignore[method-assign, assignment]


def _units(state: DataParallel, parameters: dict[str, nn.Parameter]) -> dict[str, Unit]:
    parts: dict[str, list[Part]] = {}
    for bucket in state.buckets:
        if bucket.is_ready_to_use:
            continue
        if bucket.plan.unit is not None:
            every = list(zip(bucket.plan.shards, bucket.plan.offsets, strict=True))
            parts.setdefault(bucket.plan.unit, []).append(Part(bucket, slice(0, bucket.plan.numel), every))
            continue
        held: dict[str, list[tuple[Shard, int]]] = {}
        for shard, offset in zip(bucket.plan.shards, bucket.plan.offsets, strict=True):
            held.setdefault(unit_of(shard.name), []).append((shard, offset))
        for unit, shards in held.items():  # neighbours in the bucket, which is in the order of the model
            span = slice(shards[0][1], shards[-1][1] + shards[-1][0].numel)
            parts.setdefault(unit, []).append(Part(bucket, span, shards))
    units = {name: Unit(each, parameters, state) for name, each in parts.items()}
    if state.offload is not None and (largest := max(unit.away_bytes for unit in units.values())):
        state.offload.open_ahead(largest)
    return units


class _Brought:
    """A module's forward with its unit brought around it, in forward and in backward."""

    def __init__(
        self, forward: Callable[..., Tensor], unit: Unit, before: Sequence[Unit], after: Sequence[Unit], *, stays: bool
    ):
        """`before`, `after`: the units that are needed next in backward and in forward, nearest first."""
        self.forward, self.unit, self.before, self.after, self.stays = forward, unit, before, after, stays

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.unit.bring()
        _look_ahead(self.after)
        y = _AfterBackward.apply(x, self.unit) if x.requires_grad else x
        y = self.forward(y, *rest)
        if x.requires_grad:
            y = _BeforeBackward.apply(y, self.unit, self.before)
        if not (self.stays and y.requires_grad):
            self.unit.release()
        return y


def _look_ahead(units: Sequence[Unit]) -> None:
    """The next unit is gathered while this one computes, and the one after it read."""
    if units:
        units[0].prefetch()
    for unit in units[1:]:
        unit.fetch()


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
    def forward(ctx: Any, y: Tensor, unit: Unit, before: Sequence[Unit]) -> Tensor:
        ctx.unit, ctx.before = unit, before
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.unit.bring()
        _look_ahead(ctx.before)
        return grad, None, None
