"""Runs a stage's action list: the executor of `schedule/`, for every schedule, and for one stage as for many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshwright.models.attention import EVERYWHERE, Where
from meshwright.parallel.collectives import Group
from meshwright.parallel.lanes import Lanes, used_here
from meshwright.parallel.linear import Later, WeightGradients
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches
from meshwright.schedule.pairs import paired

MOST_LEAVING = 8
"""Sends whose tensors are kept without asking whether they are through."""


class MicroBatch(NamedTuple):
    """Token ids [B, L], labels [B, L] (label -100 is ignored) and where the tokens stand."""

    tokens: Tensor
    labels: Tensor
    where: Where = EVERYWHERE


class Pipeline:
    """One stage's part of a pipelined forward and backward.

    `chunks`: this stage's, called as chunk(x, where); the one at the beginning of the model takes token ids, the one at its end
    gives what `loss` takes: (logits, labels) to the sum of the loss over tokens. `boundary` and `dtype`: of the hidden states that
    cross a stage boundary on this rank. `group`: the stages.

    Where the schedule splits the backward, its first half computes everything but the products that `weights` puts off, the weight
    gradients of linears; the second half computes these. The gradients of norms, biases and embeddings are small, and come with
    the first half. Where the schedule is paired, a forward and a backward of two chunks run at the same time.
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
        assert (len(chunks), group.size) == (schedule.chunks, schedule.stages)
        self.chunks, self.schedule, self.group, self.loss, self.weights = chunks, schedule, group, loss, weights
        self.boundary, self.dtype = boundary, dtype
        work = batches(schedule.actions[group.index])
        self.work = paired(work) if schedule.paired else work
        self.lanes: Lanes | None = None
        self.loss_dtype = torch.promote_types(dtype, torch.float32)
        self.step_type: type[Step] = Step

    def run(self, data: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """One step over `data`; gradients are of `scale` times the summed loss.

        Returns the summed, scaled loss on the stage that holds the end of the model, and zero elsewhere.
        """
        if len(data) != self.schedule.micro_batches:
            raise ValueError(f"the schedule runs {self.schedule.micro_batches} micro-batches, got {len(data)}")
        if self.lanes is None:  # the device of the first step's data is that of all
            self.lanes = Lanes(self.schedule.chunks, data[0].tokens.device, self.schedule.paired)
        step = self.step_type(self, data, scale)
        for batch in self.work:
            if not batch[0].kind.is_compute:
                step.communicate(batch)
            elif len(batch) == 2:
                step.together(*batch)
            else:
                with self.lanes.of(batch[0].chunk):
                    step.compute(batch[0])
        step.drain()
        return step.total


Part = tuple[int, int]
"""(micro-batch, chunk)."""


class Step:
    """The tensors in flight during one step.

    Of a forward that is through, only its input and its graph are kept: the output goes as soon as it is with the next chunk.
    """

    def __init__(self, pipeline: Pipeline, data: Sequence[MicroBatch], scale: Tensor):
        self.pipeline, self.data, self.scale = pipeline, data, scale
        self.schedule, self.stage = pipeline.schedule, pipeline.group.index
        self.device = data[0].tokens.device
        self.inputs: dict[Part, Tensor] = {}
        self.gradients: dict[Part, Tensor] = {}
        """Of outputs."""
        self.graphs: dict[Part, Tensor | GradientEdge] = {}
        """Where the backward begins: the loss, or the place of the output in its graph."""
        self.deferred: dict[Part, Later] = {}
        self.outgoing: dict[Action, Tensor] = {}
        self.arriving: dict[Action, torch.distributed.Work] = {}
        self.leaving: deque[tuple[torch.distributed.Work, Tensor]] = deque()
        self.total = torch.zeros((), dtype=pipeline.loss_dtype, device=self.device)

    def compute(self, action: Action) -> None:
        {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
        }[action.kind](action)

    def together(self, forward: Action, backward: Action) -> None:
        """The two of a pair at the same time. They share nothing that either changes but dicts, under keys of their own."""
        assert self.pipeline.lanes is not None
        self.pipeline.lanes.together(
            lambda: self.forward(forward), lambda: self.backward(backward), (forward.chunk, backward.chunk)
        )

    def forward(self, action: Action) -> None:
        i, chunk = part = action.micro_batch, action.chunk
        tokens, labels, where = self.data[i]
        x = tokens
        if not self.schedule.is_first(self.stage, chunk):
            self._arrive(action.of(Kind.RECV_FORWARD))
            x = used_here(self.inputs[part]).requires_grad_()
        out = self.pipeline.chunks[chunk](x, where)
        if self.schedule.is_last(self.stage, chunk):
            out = self.pipeline.loss(out, labels) * self.scale
            self.total += out.detach()
            self.graphs[part] = out
            return
        self.graphs[part] = get_gradient_edge(out)
        after = self.schedule.after(self.stage, chunk)
        assert after is not None
        if after[0] == self.stage:
            self.inputs[i, after[1]] = out.detach()
        else:
            self.outgoing[action.of(Kind.SEND_FORWARD)] = out.detach().contiguous()

    def backward(self, action: Action) -> None:
        i, chunk = part = action.micro_batch, action.chunk
        gradient = None
        if not self.schedule.is_last(self.stage, chunk):
            self._arrive(action.of(Kind.RECV_BACKWARD))
            gradient = used_here(self.gradients.pop(part))
        torch.autograd.backward(self.graphs.pop(part), gradient)
        before = self.schedule.before(self.stage, chunk)
        if before is None:
            return
        gradient = self.inputs.pop(part).grad
        assert gradient is not None
        if before[0] == self.stage:
            self.gradients[i, before[1]] = gradient
        else:
            self.outgoing[action.of(Kind.SEND_BACKWARD)] = gradient

    def backward_input(self, action: Action) -> None:
        with self.pipeline.weights.deferred() as later:
            self.backward(action)
        self.deferred[action.micro_batch, action.chunk] = later

    def backward_weight(self, action: Action) -> None:
        self.deferred.pop((action.micro_batch, action.chunk)).run()

    def communicate(self, batch: tuple[Action, ...]) -> None:
        """Post a batch of sends and receives; nothing is waited for but what was sent long ago."""
        self._let_go()
        sends = [(self.outgoing.pop(a), self.schedule.peer(self.stage, a)) for a in batch if a.kind.is_send]
        arrivals = [a for a in batch if not a.kind.is_send]
        buffers = [torch.empty(self.pipeline.boundary, dtype=self.pipeline.dtype, device=self.device) for _ in arrivals]
        receives = [(buffer, self.schedule.peer(self.stage, a)) for a, buffer in zip(arrivals, buffers, strict=True)]
        works = self.pipeline.group.exchange(sends, receives)
        if len(works) == 1 and len(batch) > 1:  # NCCL coalesces a batch into one handle
            works = works * len(batch)
        self.leaving += [(work, tensor) for work, (tensor, _) in zip(works, sends, strict=False)]
        for action, buffer, work in zip(arrivals, buffers, works[len(sends) :], strict=True):
            kept = self.inputs if action.kind is Kind.RECV_FORWARD else self.gradients
            kept[action.micro_batch, action.chunk] = buffer
            self.arriving[action] = work

    def drain(self) -> None:
        """Wait for the sends, whose tensors must live until then."""
        for work, _ in self.leaving:
            work.wait()

    def _arrive(self, receive: Action) -> None:
        """Wait for what comes from another stage; what the stage handed over to itself is there."""
        work = self.arriving.pop(receive, None)
        if work is not None:
            work.wait()

    def _let_go(self) -> None:
        """Drop the tensors that have been sent. gloo only says so when asked to wait, which is safe: the schedule does not deadlock
        even if every send is waited for (`schedule/check.py`)."""
        while self.leaving and (len(self.leaving) > MOST_LEAVING or self.leaving[0][0].is_completed()):
            self.leaving.popleft()[0].wait()
