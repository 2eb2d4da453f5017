"""What a rule looks at, what it sees, and what that costs: the layout as it is against the layout repaired, by one estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from meshwright.cost.estimate import Estimator
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.result import Estimate, Price
from meshwright.planner.bill import Terms
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

Severity = Literal["error", "warning", "note"]
"""error: cannot run, or trains wrong. warning: the repair is quicker by `WORTH` or more. note: seen, and costs less than that here."""

WORTH = 0.01
"""Share of the step from which a repair is worth a warning: the estimator ranks layouts no finer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a layout is run, as far as the layout does not say."""

    practice: Practice = OWN
    loss_scaling: bool = True
    terms: Terms = field(default_factory=Terms)
    """Its checkpoint interval is looked at where one is given."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What to run instead, and its price. `change`: a layout's notation, or the option that differs."""

    change: str
    price: Price


@dataclass(frozen=True, slots=True)
class Seen:
    """An anti-pattern in a case. `repair` is None where nothing that was tried can run."""

    what: str
    repair: Repair | None
    severity: Severity | None = None
    """None: by the price."""
    loss: float | None = None
    """Share of wall-clock time lost, where it is not the step that suffers."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A named anti-pattern. `look` gives what it sees of a layout that can run, None where it sees nothing."""

    name: str
    looks_for: str
    source: str
    look: Callable[[Case], Seen | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """`given` is None for a layout that cannot run."""

    severity: Severity
    rule: str
    what: str
    given: Price | None
    repair: Repair | None
    loss: float | None
    """Share of the time that the bad state takes: of the step, or of the wall clock. Negative where the repair is slower."""
    source: str

    def as_dict(self) -> dict[str, Any]:
        def of(price: Price | None) -> dict[str, Any] | None:
            return None if price is None else {name: getattr(price, name) for name in Price.__slots__}

        return {
            "severity": self.severity,
            "rule": self.rule,
            "what": self.what,
            "given": of(self.given),
            "repaired": of(self.repair.price) if self.repair else None,
            "loss": self.loss,
            "repair": self.repair.change if self.repair else None,
            "source": self.source,
        }


class Case:
    """One layout of one problem, and the prices of its repairs."""

    def __init__(self, model: Model, cluster: Cluster, workload: Workload, layout: Layout, habits: Habits | None = None):
        self.model, self.cluster, self.workload, self.layout = model, cluster, workload, layout
        self.habits = habits or Habits()
        self._estimators: dict[tuple[int, Practice], tuple[Model, Estimator]] = {}
        self._prices: dict[tuple[Layout, Practice, int], Price | None] = {}

    @property
    def practice(self) -> Practice:
        return self.habits.practice

    @property
    def domain(self) -> int:
        return self.cluster.fabric.domain

    def estimator(self, practice: Practice | None = None, model: Model | None = None) -> Estimator:
        """Of the case, run by another practice or with a model changed, where these are given."""
        practice, model = practice or self.practice, model or self.model
        key = (id(model), practice)
        if key not in self._estimators:
            self._estimators[key] = model, Estimator(model, self.cluster, self.workload, practice)
        return self._estimators[key][1]

    @cached_property
    def given(self) -> Price:
        return self.estimator().played(self.layout)

    @cached_property
    def estimate(self) -> Estimate:
        return self.estimator().estimate(self.layout)

    def price(self, layout: Layout, practice: Practice | None = None, model: Model | None = None) -> Price | None:
        """None for a layout that cannot run."""
        key = layout, practice or self.practice, id(model or self.model)
        if key not in self._prices:
            estimator = self.estimator(practice, model)
            try:
                estimator.check(layout)
                self._prices[key] = estimator.played(layout)
            except UserError:
                self._prices[key] = None
        return self._prices[key]

    def quickest(self, *tiers: Iterable[Layout]) -> Repair | None:
        """The quickest layout of the first of `tiers` that has one which fits or, where the given one does not fit either, which
        needs no more. Tiers go from the smallest change to the largest, so that a price is that of the anti-pattern alone."""
        return next((found for tier in tiers if (found := self._quickest(tier))), None)

    def _quickest(self, layouts: Iterable[Layout]) -> Repair | None:
        best: tuple[bool, float, str, Price] | None = None
        for layout in dict.fromkeys(layouts):
            price = self.price(layout) if layout != self.layout else None
            if price is None or not (price.fits or (price.peak_bytes <= self.given.peak_bytes and not self.given.fits)):
                continue
            row = (not price.fits, price.step_time_s, str(layout), price)
            if best is None or row[:3] < best[:3]:
                best = row
        return Repair(best[2], best[3]) if best else None

    def practised(self, option: str, **changes: Any) -> Repair | None:
        """The layout run by another practice; `option` says so to a person."""
        price = self.price(self.layout, replace(self.practice, **changes))
        return Repair(option, price) if price else None

    def finding(self, rule: Rule, seen: Seen) -> Finding:
        loss = seen.loss
        if loss is None and seen.repair is not None:
            loss = 1 - seen.repair.price.step_time_s / self.given.step_time_s
        severity: Severity = seen.severity or ("warning" if loss is not None and loss >= WORTH else "note")
        return Finding(severity, rule.name, seen.what, self.given, seen.repair, loss, rule.source)
