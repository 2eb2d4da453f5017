"""When everything happens that a dry run has seen: in seconds where a cluster is given, in its order alone where none is. Without torch.

Each stage does its actions in order, as soon as what they need has arrived from another stage. Within an action computations follow one
another; a collective that the engine waits for at once holds them up, any other runs on a lane of its axis until somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from meshwright.schedule.actions import Action
from meshwright.schedule.clock import run_clock
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import alike_stages
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.trace.result import Attended, Change, Event, Product, Received, Section, Sent, StageTrace, Trace, Waited
from meshwright.trace.seconds import Prices

COMPUTE = "compute"
TICK = 1e-6
"""Seconds of an event where there are only orders."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something on `lane` (compute, or an axis) for `seconds` from `start`. `what`: an event, or words for what no event stands for."""

    lane: str
    what: Event | str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Bar:
    """A section from `start` to `end`; `fullest`: the moment of its most live bytes."""

    section: Section
    start: float
    end: float
    fullest: float


@dataclass(frozen=True, slots=True)
class StageTimeline:
    stage: StageTrace
    bars: tuple[Bar, ...]
    spans: tuple[Span, ...]

    @property
    def end(self) -> float:
        return max(span.end for span in (*self.bars, *self.spans))


def in_order(trace: Trace) -> tuple[StageTimeline, ...]:
    """One tick an event, in the order in which it was seen: nothing waits, and nothing runs beside anything."""
    return tuple(_Stage(stage, _ticks, nothing).play({}) for stage in trace.stages)


def _ticks(event: Event) -> float:
    return TICK if isinstance(event, Product | Attended | Sent) else 0.0


def nothing(section: Section) -> tuple[float, float]:
    return 0.0, 0.0


def in_seconds(trace: Trace, model: Model, prices: Prices) -> tuple[StageTimeline, ...]:
    """By the prices of the cost model. Stages that were not traced take as long as those that are like them, or as the estimate has it."""
    layout = trace.layout
    stages = {stage.stage: _priced(stage, prices) for stage in trace.stages}
    actions = {at: stage.actions() for at, stage in stages.items()}
    like = _like(model, layout, stages)
    estimated = prices.estimate.timeline
    assert estimated is not None, "an estimate that played its schedule has a timeline"

    def seconds(stage: int, action: Action) -> float:
        if stage in like and action in actions[like[stage]]:
            return actions[like[stage]][action]
        return estimated.seconds[stage][action.chunk].of(action.kind)

    schedule = layout_schedule(layout, micro_batches(layout, trace.workload))
    turns = run_clock(schedule, seconds, prices.send)
    begin = max(stage.before() for stage in stages.values())
    starts = {at: {turn.action: begin + turn.start for turn in turns if turn.stage == at} for at in stages}
    return tuple(stage.play(starts[at]) for at, stage in stages.items())


def _like(model: Model, layout: Layout, traced: Iterable[int]) -> dict[int, int]:
    """Of each stage that is like one that was traced, or was itself: which."""
    known = set(traced)
    out = {}
    for members in alike_stages(model, layout):
        for stage in members:
            match = stage if stage in known else next((each for each in members if each in known), None)
            if match is not None:
                out[stage] = match
    return out


def _priced(stage: StageTrace, prices: Prices) -> _Stage:
    def rest(section: Section) -> tuple[float, float]:
        if section.action is not None:
            return prices.rest(stage, section.action)
        return (prices.update(stage), 0.0) if section.name == "optimizer" else (0.0, 0.0)

    return _Stage(stage, lambda event: prices.of(event, stage.rank), rest, beside=prices.hides)


class _Stage:
    """Plays one stage. `rest(section)`: seconds that no event stands for, of elementwise work and of waiting for the host; `beside`:
    whether communication runs beside computation."""

    def __init__(
        self,
        stage: StageTrace,
        seconds: Callable[[Event], float],
        rest: Callable[[Section], tuple[float, float]],
        beside: bool = False,
    ):
        self.stage, self.seconds, self.rest, self.beside = stage, seconds, rest, beside

    def actions(self) -> dict[Action, float]:
        """How long each action takes that begins with nothing under way."""
        out: dict[Action, float] = {}
        known: dict[tuple[int, Action], float] = {}
        for section in self.stage.sections:
            if section.action is not None:
                key = id(section.work), Action(section.action.kind, 0, section.action.chunk)
                if key not in known:
                    known[key] = _Lanes(self).section(section, 0.0).end
                out[section.action] = known[key]
        return out

    def before(self) -> float:
        """When the first action can begin."""
        lanes, now = _Lanes(self), 0.0
        for section in self.stage.sections:
            if section.action is not None:
                break
            now = lanes.section(section, now).end
        return now

    def play(self, starts: dict[Action, float]) -> StageTimeline:
        lanes, bars, now = _Lanes(self), [], 0.0
        for section in self.stage.sections:
            if section.action is not None:
                now = max(now, starts.get(section.action, now))
            bar = lanes.section(section, now)
            now = bar.end
            bars.append(bar)
        return StageTimeline(self.stage, tuple(bars), tuple(lanes.spans))


class _Lanes:
    """What runs, and until when."""

    def __init__(self, stage: _Stage):
        self.stage = stage
        self.spans: list[Span] = []
        self._free: dict[str, float] = {}
        self._posted: dict[int, float] = {}

    def section(self, section: Section, start: float) -> Bar:
        now, here, most, fullest = start, 0, 0, start
        for event in _events(section):
            if isinstance(event, Change):
                here += event.sign * event.storage.nbytes
                if here > most:
                    most, fullest = here, now
            else:
                now = self._event(event, now)
        for name, seconds in zip(("elementwise", "waits for the host"), self.stage.rest(section), strict=True):
            if seconds > 0:
                self.spans.append(Span(COMPUTE, name, now, seconds))
                now += seconds
        return Bar(section, start, now, fullest)

    def _event(self, event: Event, now: float) -> float:
        """Returns when the next computation may begin."""
        if isinstance(event, Waited):
            return max(now, self._posted.pop(event.number, now))
        if isinstance(event, Received):
            return now  # the schedule, and the sends of a ring, which all its ranks do at once, say when it is there
        seconds = self.stage.seconds(event)
        if not isinstance(event, Sent):
            self.spans.append(Span(COMPUTE, event, now, seconds))
            return now + seconds
        start = max(now, self._free.get(event.axis, 0.0))
        self._free[event.axis] = start + seconds
        self.spans.append(Span(event.axis, event, start, seconds))
        if event.number and (self.stage.beside or event.axis == "pp"):
            self._posted[event.number] = start + seconds
            return now
        return start + seconds


def _events(section: Section) -> Iterator[Event]:
    return (event for part in section.parts for event in part.events)
