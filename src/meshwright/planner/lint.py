"""Every rule on one layout: what is wrong with it, and what that costs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshwright.cost.result import Price
from meshwright.planner.rules import pipeline, placement, shapes, state, work
from meshwright.planner.rules.case import Case, Finding, Habits, Rule
from meshwright.spec.cluster import Cluster
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

RULES: tuple[Rule, ...] = (*state.RULES, *placement.RULES, *pipeline.RULES, *work.RULES)
"""Of layouts that can run; `shapes` has those of layouts that cannot."""
ORDER = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Linted:
    """The findings about a layout, the worst first. `price` is None for a layout that cannot run."""

    layout: Layout
    price: Price | None
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is in the way of running it."""
        return all(f.severity != "error" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        price = self.price
        return {
            "layout": str(self.layout),
            "given": None if price is None else {name: getattr(price, name) for name in Price.__slots__},
            "findings": [f.as_dict() for f in self.findings],
        }


def lint(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    ranks: int | None = None,
    habits: Habits | None = None,
) -> Linted:
    """Run every rule on `layout`. `ranks`: that it should fill; None: as many as it does. What cannot be split this way is a
    finding too; UserError is raised only for what no layout could mend."""
    case = Case(model, cluster, workload, layout, habits)
    refused = shapes.refusals(case, ranks or layout.world)
    if refused:
        return Linted(layout, None, tuple(refused))
    seen = [(rule, found) for rule in RULES if (found := rule.look(case)) is not None]
    findings = [case.finding(rule, found) for rule, found in seen]
    findings.sort(key=lambda f: (ORDER.index(f.severity), -(f.loss or 0.0)))
    return Linted(layout, case.given, tuple(findings))
