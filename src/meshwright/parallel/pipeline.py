"""Runs a stage's action list: the executor of `schedule/`, for pipelines of one stage and more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meshwright.models.attention import EVERYWHERE, Where
from meshwright.parallel.collectives import Group
from meshwright.parallel.linear import WeightGradients
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches

class MicroBatch(NamedTuple):
    """Token ids [B, L], labels [B, L] (label -100 is ignored) and where the tokens stand."""

    tokens: Tensor
    labels: Tensor
    where: Where = EVERYWHERE


class Pipeline:
    """One stage's part of a pipelined forward and backward.

    `loss`: (logits, labels) to the sum of the loss over tokens, on the last stage. `boundary`: shape of the hidden states that
    cross a stage boundary on this rank. `on_last_backward` is called before the step's last backward.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: Schedule,
        group: Group,
        loss: Callable[[Tensor, Tensor], Tensor],
        boundary: tuple[int, ...],
        dtype: torch.dtype,
        weights: WeightGradients,
    ):
        self.stage, self.group, self.loss, self.boundary, self.dtype = chunks[0], group, loss, boundary, dtype
        actions = schedule.actions[group.index]
        self.work = batches(actions)
        self.micro_batches = schedule.micro_batches
        self._last_backward = next(a for a in reversed(actions) if a.kind is Kind.BACKWARD)
        self.is_first, self.is_last = group.index == 0, group.index == group.size - 1
        self.loss_dtype = torch.promote_types(dtype, torch.float32)

    def run(self, data: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """One step over `data`; gradients are of `scale` times the summed loss.

        Returns the summed, scaled loss on the last stage and zero elsewhere.
        """
        if len(data) != self.micro_batches:
            raise ValueError(f"the schedule runs {self.micro_batches} micro-batches, got {len(data)}")
        step = _Step(self, data, scale)
        for batch in self.work:
            action = batch[0]
            if action.kind is Kind.FORWARD:
                step.forward(action.micro_batch)
            elif action.kind is Kind.BACKWARD:
                step.backward(action.micro_batch)
            else:
                step.communicate(batch)
        step.drain()
        return step.total


class _Step:
    """The tensors in flight during one step."""

    def __init__(self, pipeline: Pipeline, data: Sequence[MicroBatch], scale: Tensor):
        self.pipeline, self.data, self.scale = pipeline, data, scale
        self.device = data[0][0].device
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.arriving: dict[Action, torch.distributed.Work] = {}
        self.leaving: list[tuple[torch.distributed.Work, Tensor]] = []
        self.total = torch.zeros((), dtype=pipeline.loss_dtype, device=self.device)

    def forward(self, i: int) -> None:
        pipeline = self.pipeline
        tokens, labels, where = self.data[i]
        if pipeline.is_first:
            x = tokens
        else:
            self._arrive(Action(Kind.RECV_FORWARD, i))
            x = self.inputs[i].requires_grad_()
        out = pipeline.stage(x, where)
        if pipeline.is_last:
            out = pipeline.loss(out, labels) * self.scale
            self.total += out.detach()
        self.outputs[i] = out

    def backward(self, i: int) -> None:
        gradient = None
        if not self.pipeline.is_last:
            self._arrive(Action(Kind.RECV_BACKWARD, i))
            gradient = self.gradients.pop(i)
        torch.autograd.backward(self.outputs.pop(i), gradient)

    def communicate(self, batch: tuple[Action, ...]) -> None:
        here = self.pipeline.group.index
        sends = [(self._outgoing(a), here + a.kind.step) for a in batch if a.kind.is_send]
        arrivals = [a for a in batch if not a.kind.is_send]
        buffers = [torch.empty(self.pipeline.boundary, dtype=self.pipeline.dtype, device=self.device) for _ in arrivals]
        receives = [(buffer, here + a.kind.step) for a, buffer in zip(arrivals, buffers, strict=True)]
        works = self.pipeline.group.exchange(sends, receives)
        if len(works) == 1 and len(batch) > 1:  # NCCL coalesces a batch into one handle
            works = works * len(batch)
        self.leaving += [(work, tensor) for work, (tensor, _) in zip(works, sends, strict=False)]
        for action, buffer, work in zip(arrivals, buffers, works[len(sends) :], strict=True):
            (self.inputs if action.kind is Kind.RECV_FORWARD else self.gradients)[action.micro_batch] = buffer
            self.arriving[action] = work

    def drain(self) -> None:
        """Wait for the sends, whose tensors must live until then."""
        for work, _ in self.leaving:
            work.wait()

    def _arrive(self, action: Action) -> None:
        self.arriving.pop(action).wait()

    def _outgoing(self, action: Action) -> Tensor:
        if action.kind is Kind.SEND_FORWARD:
            return self.outputs[action.micro_batch].detach()
        gradient = self.inputs.pop(action.micro_batch).grad
        assert gradient is not None
        return gradient
