"""Each collective and each scaling factor is needed: without it, or with it twice, gradients, loss, norm, the next steps or the
bytes sent come out wrong.

    python -m pytest tests/parallel/test_mutants.py -m "parity or not parity"     every mutant
    python tests/parallel/test_mutants.py                                          the same as a table, for docs/parity.md
"""

from __future__ import annotations

import sys
from functools import lru_cache

import pytest
from fixtures import MODELS, SPARSE, WORKLOAD
from mutants import MUTANTS, CollectiveMutant, Mutant, Outcome, Site, run, sites

from meshwright.cost.program import Place, rank_program
from meshwright.cost.traffic import step_traffic
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.testing import RankError, run_distributed

TOLERANCE = 1e-9

FIXTURES = (
    ("untied", "mb4"),
    ("untied", "dp2 mb2"),
    ("untied", "tp2 mb4"),
    ("untied", "tp2:sp mb2"),
    ("untied", "tp4:async mb2"),
    ("untied", "pp2 mb2"),
    ("tied", "pp2 mb2"),
    ("untied", "dp2:zero1 mb2"),
    ("untied", "dp2:zero2 mb2"),
    ("untied", "dp2:zero3 mb2"),
    ("untied", "dp4:zero1x2 mb1"),
    ("few-kv-heads", "tp2 mb4"),
    ("qk-norm", "tp2 mb4"),
    ("deepseek-v3-like", "tp2 mb4"),
    ("deepseek-v3-like", "tp2:sp mb4"),
    ("untied", "cp2:ring mb4"),
    ("untied", "cp2:ulysses mb4"),
    ("gpt-oss-like", "dp2 ep2 mb2"),
    ("gpt-oss-like", "tp2 etp2 mb4"),
    ("deepseek-v3-like balanced", "tp2:sp pp2 mb4"),
)
"""The smallest layouts that between them run every call of a collective."""

BALANCED = " balanced"
"""Experts with an auxiliary loss, z-loss and selection bias, whose statistics are not booked as a step's traffic."""


def model_of(name: str) -> Model:
    return (MODELS | SPARSE)[name.removesuffix(BALANCED)]


@lru_cache
def outcomes(name: str, layout: str, mutant: Mutant | None) -> list[Outcome]:
    parsed = parse_layout(f"{layout} fp64")
    return run_distributed(run, parsed.world, mutant, model_of(name), WORKLOAD, parsed, name.endswith(BALANCED))  # type: ignore[no-any-return]


@lru_cache
def fixtures_that_run(site: Site) -> tuple[tuple[str, str], ...]:
    return tuple(f for f in FIXTURES if any(site in outcome.hit for outcome in outcomes(*f, None)))


def difference(name: str, layout: str, mutant: Mutant | None) -> str | None:
    """What shows that something is wrong; None if nothing does."""
    (reference,) = outcomes(name, "mb4", None)
    whole = {shard.name: gradient for shard, gradient in reference.gradients}
    parsed = parse_layout(f"{layout} fp64")
    for rank in outcomes(name, layout, mutant):
        for shard, gradient in rank.gradients:
            error = (shard.of(whole[shard.name]) - gradient).abs().max()
            if not error <= TOLERANCE * whole[shard.name].abs().max():
                return "gradient"
        if rank.figures != pytest.approx(reference.figures, rel=TOLERANCE):
            return "loss or norm"
        if rank.losses != pytest.approx(reference.losses, rel=TOLERANCE):
            return "later steps"
        if rank.loads != pytest.approx(reference.loads, rel=TOLERANCE):
            return "expert loads"
        if name.endswith(BALANCED):
            continue
        program = rank_program(
            model_of(name), parsed, WORKLOAD, Place(rank.stage, rank.seat.tp, rank.seat.ep, rank.seat.etp)
        )
        predicted = step_traffic(program, micro_batches(parsed, WORKLOAD))
        if rank.sent != [(s.axis, s.op, s.group_size, s.count, s.bytes) for s in predicted]:
            return "traffic"
    return None


def caught(mutant: Mutant) -> tuple[str, str, str] | None:
    """(model, layout, what differs) of the first fixture that notices `mutant`."""
    fixtures = fixtures_that_run(mutant.site) if isinstance(mutant, CollectiveMutant) else FIXTURES
    for name, layout in fixtures:
        try:
            what = difference(name, layout, mutant)
        except RankError:
            what = "an error"
        if what:
            return name, layout, what
    return None


@pytest.mark.parametrize(("name", "layout"), FIXTURES)
def test_the_engine_itself_is_right(name: str, layout: str) -> None:
    assert difference(name, layout, None) is None


def test_every_call_of_a_collective_is_run_by_some_fixture() -> None:
    assert [str(site) for site in sites() if not fixtures_that_run(site)] == []


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=[] if i % 4 == 0 else [pytest.mark.parity]) for i, m in enumerate(MUTANTS)],
    ids=str,
)
def test_mutant_is_caught(mutant: Mutant) -> None:
    assert caught(mutant)


def table() -> list[str]:
    """Markdown: one line a mutant."""
    lines = ["| mutant | caught by | what differs |", "|---|---|---|"]
    for mutant in MUTANTS:
        found = caught(mutant)
        where, what = (f"`{found[0]}`, `{found[1]}`", found[2]) if found else ("**not caught**", "")
        lines.append(f"| {mutant} | {where} | {what} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
