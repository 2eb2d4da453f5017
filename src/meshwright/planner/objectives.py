"""How many accelerators: the fewest that meet a deadline, the quickest that a budget pays for, those whose tokens are cheapest.

Each count is planned by a search of its own and billed with failures, checkpoints, energy and spares (`bill.py`). Time falls and money
rises with the count as good as always (what does not divide may break it), so a limit is found by halving over the counts, and its
neighbours are planned too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshwright.cost.economics import DAY, Bill
from meshwright.cost.result import Estimate
from meshwright.planner.around import Problem
from meshwright.planner.bill import Terms, training_bill
from meshwright.spec.cluster import Cluster
from meshwright.spec.errors import UserError

FACTORS = (2, 3, 5)
"""Counts of nodes have no other prime factors: batches and layers divide by others seldom."""
BESIDE = 2
"""Counts on either side of the limit that are planned too."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A count of accelerators with its best layout, and what the whole run costs."""

    estimate: Estimate
    bill: Bill

    @property
    def gpus(self) -> int:
        return self.estimate.layout.world

    @property
    def usd(self) -> float | None:
        """Accelerators and energy; None where no price is known."""
        if self.bill.usd_hardware is None:
            return None
        return self.bill.usd_hardware + (self.bill.energy.usd if self.bill.energy else 0.0)

    def as_dict(self) -> dict[str, Any]:
        e = self.estimate
        row = {"gpus": self.gpus, "layout": str(e.layout), "tokens_per_s": e.tokens_per_s, "mfu": e.mfu}
        return row | {"usd": self.usd, "bill": self.bill.as_dict()}


@dataclass(frozen=True, slots=True)
class Sizing:
    """`chosen` is None where no count does what was asked; `tried` has every count that was planned, smallest first."""

    asked: str
    chosen: Sized | None
    tried: tuple[Sized, ...]
    idle: tuple[int, ...]
    """Counts planned for which nothing fits or is legal."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "chosen": self.chosen.as_dict() if self.chosen else None,
            "tried": [s.as_dict() for s in self.tried],
            "idle": list(self.idle),
        }


@dataclass
class Sizer:
    """Plans and bills counts of up to `problem.gpus` accelerators, each once."""

    problem: Problem
    tokens: float
    terms: Terms = field(default_factory=Terms)
    progress: Callable[[int], None] | None = None
    _known: dict[int, Sized | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise UserError(f"tokens must be above 0, got {self.tokens:g}")

    def for_deadline(self, seconds: float) -> Sizing:
        """The fewest accelerators that train the tokens in `seconds` of wall clock."""
        every = counts(self.problem.cluster, self.problem.gpus)
        met = self._meeting(every, lambda s: s.bill.wall_seconds <= seconds)
        return self._answer(f"{seconds / DAY:,.3g} days", min(met, key=lambda s: s.gpus, default=None))

    def for_budget(self, usd: float) -> Sizing:
        """As many accelerators as finish first of those whose bill is at most `usd`."""
        every = counts(self.problem.cluster, self.problem.gpus)
        met = self._meeting(every[::-1], lambda s: s.usd is not None and s.usd <= usd)
        return self._answer(f"{usd:,.0f} USD", min(met, key=lambda s: s.bill.wall_seconds, default=None))

    def cheapest(self) -> Sizing:
        """Whose tokens cost least: all accelerators, three quarters, half, three eighths of them, and so on until nothing fits."""
        cluster, most = self.problem.cluster, self.problem.gpus
        halves = {
            most // 2**i * 3 // 4 if three else most // 2**i for i in range(most.bit_length()) for three in (False, True)
        }
        nodes = sorted(halves & {*counts(cluster, most), most})
        fits = [sized for n in nodes if (sized := self._at(n)) is not None]
        priced = [s for s in fits if s.usd is not None]
        cost: Callable[[Sized], float] = (lambda s: s.usd or 0.0) if priced else (lambda s: s.bill.accelerator_hours)
        what = "least money a token" if priced else "least accelerator hours a token"
        return self._answer(what, min(priced or fits, key=cost, default=None))

    def _meeting(self, every: list[int], meets: Callable[[Sized], bool]) -> list[Sized]:
        """Those planned that meet the limit, once the first of `every` from which on all do is found by halving."""

        def good(at: int) -> bool:
            sized = self._at(every[at])
            return sized is not None and meets(sized)

        low, high = 0, len(every)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if good(middle) else (middle + 1, high)
        for at in range(max(0, low - BESIDE), min(len(every), low + BESIDE + 1)):
            self._at(every[at])
        return [s for s in self._known.values() if s is not None and meets(s)]

    def _answer(self, asked: str, chosen: Sized | None) -> Sizing:
        tried = tuple(s for _, s in sorted(self._known.items()) if s is not None)
        return Sizing(asked, chosen, tried, tuple(sorted(n for n, s in self._known.items() if s is None)))

    def _at(self, gpus: int) -> Sized | None:
        if gpus not in self._known:
            p = self.problem
            best = Problem(p.model, p.cluster, p.workload, gpus, p.precision).best()
            self._known[gpus] = None if best is None else self._billed(best)
            if self.progress:
                self.progress(len(self._known))
        return self._known[gpus]

    def _billed(self, best: Estimate) -> Sized | None:
        try:
            bill = training_bill(best, self.problem.model, self.problem.cluster, self.tokens, self.terms)
        except UserError:  # so many fail so often that the job never gets on
            return None
        return Sized(best, bill)


def counts(cluster: Cluster, most: int) -> list[int]:
    """Counts of accelerators worth planning, up to `most`: parts of one node, then whole nodes."""
    each = cluster.node.accelerators
    parts = [n for n in range(1, min(each, most + 1)) if each % n == 0]
    nodes = [n for n in range(1, most // each + 1) if _smooth(n) or n == most // each]
    return [*parts, *(n * each for n in nodes)]


def _smooth(n: int) -> bool:
    for factor in FACTORS:
        while n % factor == 0:
            n //= factor
    return n == 1
