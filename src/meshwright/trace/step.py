"""A pipeline's step of which every action is a section, and of which micro-batches that are alike are run once.

The first `RUN` micro-batches of a stage, counted by kind of action and chunk, and the last are run for real, operator by operator; the
others do what the last of the first ones did: their work is replayed in the place where the schedule has it. The tensors that go from
action to action are there for all of them, so what waits to be sent or used is counted as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from meshwright.parallel.pipeline import MicroBatch, Part, Pipeline, Step
from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.check import batches
from meshwright.trace.paths import BACKWARD
from meshwright.trace.recorder import Recorder
from meshwright.trace.result import Category, Storage, Work

RUN = 3
"""From the third on a micro-batch finds all buffers made, and gradients to add to."""

Key = tuple[Kind, int, int]
"""Kind of action, chunk, and how many of both came before: at most RUN - 1, or -1 for the last."""


@dataclass(frozen=True, slots=True)
class Done:
    """What an action did, the storage that it handed on, and whether it left for the second half of a split backward what it was given
    (input, gradient): the linear that is last in its chunk needs the gradient that came in."""

    work: Work
    handed: Storage | None
    keeps: tuple[bool, ...]


@dataclass
class Plan:
    """Which actions of a stage are run. `done` is shared by stages that are alike; `everything`: nothing is replayed."""

    schedule: Schedule
    stage: int
    done: dict[Key, Done] = field(default_factory=dict)
    everything: bool = False
    first: int = 0
    last: int = 0
    """The sections that are the schedule's, from `first` to before `last`."""

    def __post_init__(self) -> None:
        self.keys = _keys(self.schedule, self.stage)
        is_known = all(key in self.done for key in self.keys.values())
        fresh = {action.micro_batch for action, key in self.keys.items() if key[2] != RUN - 1 or not self._repeats(key)}
        third = [min(a.micro_batch for a, k in self.keys.items() if k == key) for key in set(self.keys.values())]
        wanted = set(range(self.schedule.micro_batches)) if self.everything else fresh | set(third)
        self.run: frozenset[int] = frozenset(() if is_known else wanted)

    def _repeats(self, key: Key) -> bool:
        return sum(other == key for other in self.keys.values()) > 1


def _keys(schedule: Schedule, stage: int) -> dict[Action, Key]:
    computed = [action for batch in batches(schedule.actions[stage]) for action in batch if action.kind.is_compute]
    totals = Counter((action.kind, action.chunk) for action in computed)
    seen: Counter[tuple[Kind, int]] = Counter()
    out = {}
    for action in computed:
        kind = action.kind, action.chunk
        is_last = seen[kind] == totals[kind] - 1
        out[action] = (*kind, -1 if is_last and seen[kind] >= RUN else min(seen[kind], RUN - 1))
        seen[kind] += 1
    return out


class TracedStep(Step):
    """`Step` with a section for each action."""

    def __init__(
        self, recorder: Recorder, plan: Plan, pipeline: Pipeline, data: Sequence[MicroBatch], scale: Tensor
    ) -> None:
        super().__init__(pipeline, data, scale)
        self.recorder, self.plan = recorder, plan
        self.kept: dict[Part, list[Tensor]] = {}
        """What came in, while the second half of a replayed backward needs it."""
        recorder.start("between")
        plan.first = len(recorder.sections)

    def forward(self, action: Action) -> None:
        if action.micro_batch in self.plan.run:
            self._run(action, super().forward)
            return
        if not self.schedule.is_first(self.stage, action.chunk):
            self._arrive(action.of(Kind.RECV_FORWARD))
        self._replay(action)

    def backward(self, action: Action) -> None:
        if action.micro_batch in self.plan.run:
            self._run(action, super().backward)
            return
        if not self.schedule.is_last(self.stage, action.chunk):
            self._arrive(action.of(Kind.RECV_BACKWARD))
        self._replay(action)

    def together(self, forward: Action, backward: Action) -> None:
        """One after the other: what is recorded belongs to one of them, and the recorder follows one thread."""
        self.forward(forward)
        self.backward(backward)

    def backward_input(self, action: Action) -> None:
        if action.micro_batch in self.plan.run:
            super().backward_input(action)  # which calls `backward`
        else:
            self.backward(action)

    def backward_weight(self, action: Action) -> None:
        if action.micro_batch in self.plan.run:
            self._run(action, super().backward_weight)
        else:
            self._replay(action)

    def communicate(self, batch: tuple[Action, ...]) -> None:
        with self.recorder.section(" ".join(map(str, batch)), category="boundary"):
            super().communicate(batch)
            for action in batch:
                kept = {Kind.RECV_FORWARD: self.inputs, Kind.RECV_BACKWARD: self.gradients}.get(action.kind)
                if kept is not None:
                    self.recorder.travels(kept[action.micro_batch, action.chunk])

    def drain(self) -> None:
        with self.recorder.section("drain"):
            super().drain()
            self.leaving.clear()
        self.recorder.start("end of backward")
        self.plan.last = len(self.recorder.sections)

    def _let_go(self) -> None:
        """What was sent is through when the stage next communicates: it has computed in between."""
        self.leaving.clear()

    def _run(self, action: Action, run: Callable[[Action], None]) -> None:
        is_forward = action.kind is Kind.FORWARD
        category: Category = "activations" if is_forward or action.kind is Kind.BACKWARD_INPUT else "temporary"
        part = action.micro_batch, action.chunk
        given = [self.recorder.storage(held[part]) for held in (self.inputs, self.gradients) if part in held]
        with self.recorder.section(str(action), action, category) as work:
            outside = "loss" if is_forward and self.schedule.is_last(self.stage, action.chunk) else "decoder"
            with self.recorder.paths.at(outside if is_forward else BACKWARD):
                run(action)
                if is_forward:
                    self._mark(action)
            handed = self._handed(action)
            storage = None if handed is None else self.recorder.travels(handed)
        keeps = tuple(self.recorder.is_live(each) for each in given)
        self.plan.done[self.plan.keys[action]] = Done(work, storage, keeps)

    def _mark(self, action: Action) -> None:
        begin = self.graphs[action.micro_batch, action.chunk]
        if isinstance(begin, Tensor):
            self.recorder.paths.mark(begin)

    def _replay(self, action: Action) -> None:
        done, part = self.plan.done[self.plan.keys[action]], (action.micro_batch, action.chunk)
        self.recorder.start(str(action), action, work=done.work)
        if action.kind.gives_input_gradient:
            given = [held.pop(part) for held in (self.inputs, self.gradients) if part in held]
            self.kept[part] = [each for each, keeps in zip(given, done.keeps, strict=True) if keeps]
            given.clear()
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self.kept.pop(part, None)
        if done.handed is not None:
            self._hand_on(action, self.recorder.stand_in(done.handed, self.pipeline.boundary, self.pipeline.dtype))
        self.recorder.start("between")

    def _place(self, action: Action) -> tuple[dict[Any, Tensor], Any] | None:
        """Where the tensor lies that a computation hands on: in which dict, under which key."""
        forward = action.kind is Kind.FORWARD
        if not (forward or action.kind.gives_input_gradient):
            return None
        seat = (self.schedule.after if forward else self.schedule.before)(self.stage, action.chunk)
        if seat is None:
            return None
        if seat[0] != self.stage:
            return self.outgoing, action.of(Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD)
        return (self.inputs if forward else self.gradients), (action.micro_batch, seat[1])

    def _handed(self, action: Action) -> Tensor | None:
        place = self._place(action)
        return None if place is None else place[0][place[1]]

    def _hand_on(self, action: Action, tensor: Tensor) -> None:
        place = self._place(action)
        assert place is not None, f"{action} hands nothing on"
        place[0][place[1]] = tensor
