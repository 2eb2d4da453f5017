"""Power, failures and checkpoints against published figures and against brute force; bills that add up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import api
from meshwright.cli.main import main
from meshwright.cost.economics import (
    DAY,
    HOUR,
    best_interval,
    daly_interval,
    effective_time_ratio,
    energy,
    mean_time_between_failures,
    young_interval,
)
from meshwright.planner.bill import Terms
from meshwright.spec.errors import UserError

RUN: dict[str, Any] = {
    "model": "llama-3-405b", "cluster": "h100-superpod", "seq": 8192, "global_batch": 2048,
    "layout": "dp128:zero1 tp8:sp pp16 mb1", "tokens": 15.6e12,
}  # fmt: skip


def test_fifty_thousand_accelerators_for_sixty_days() -> None:
    drawn = energy(50_000, 350, 60 * DAY, 0.10)
    assert drawn.watts == 17.5e6
    assert drawn.kwh == pytest.approx(25.2e6)
    assert drawn.usd == pytest.approx(2.52e6)


def test_llama_3_drew_about_thirty_gigawatt_hours() -> None:
    """16,384 H100 for 54 days in nodes of 10.2 kW with PUE 1.1: 29.8 GWh."""
    assert energy(16_384, 10_200 / 8, 54 * DAY, 0.1, pue=1.1).kwh == pytest.approx(29.8e6, rel=2e-3)


@pytest.mark.parametrize(
    ("nodes", "rate", "save", "minutes", "ratio"),
    [
        (512, 6.5e-3, 10, 12.0, 0.961),
        (512, 6.5e-3, 60, 29.4, 0.923),
        (512, 6.5e-3, 300, 65.8, 0.848),
        (2048, 6.5e-3, 10, 6.0, 0.901),
        (2048, 6.5e-3, 60, 14.7, 0.829),
        (2048, 6.5e-3, 300, 32.9, 0.696),
        (2048, 3.79e-3, 60, 19.3, 0.876),
    ],
)
def test_effective_time_at_youngs_interval(nodes: int, rate: float, save: float, minutes: float, ratio: float) -> None:
    """Worked by hand from the formulas of arXiv 2410.21680 with restarts of 300 s."""
    between = mean_time_between_failures(nodes, rate)
    interval = young_interval(save, between)
    assert interval / 60 == pytest.approx(minutes, abs=0.06)
    assert effective_time_ratio(interval, save, between, 300) == pytest.approx(ratio, abs=1e-3)


def test_a_thousand_accelerators_by_the_inverse_law() -> None:
    assert mean_time_between_failures(128, 6.5e-3) / HOUR == pytest.approx(28.8, abs=0.1)


@given(st.floats(0.01, 500), st.floats(2_000, 1e6), st.floats(0, 1_000))
def test_no_other_interval_is_better(save: float, between: float, restart: float) -> None:
    best = best_interval(save, between, restart)
    most = effective_time_ratio(best, save, between, restart)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert effective_time_ratio(best * factor, save, between, restart) <= most + 1e-12


def test_twice_or_half_the_interval_costs_a_quarter_of_the_loss() -> None:
    between, save = 1e6, 1.0
    best = young_interval(save, between)
    least = 1 - effective_time_ratio(best, save, between, 0)
    for factor in (0.5, 2.0):
        assert (1 - effective_time_ratio(best * factor, save, between, 0)) / least == pytest.approx(1.25, abs=0.01)


def test_intervals_that_cannot_be() -> None:
    with pytest.raises(UserError, match="saving takes 600 s and a failure comes every 1,000 s"):
        daly_interval(600, 1000)
    with pytest.raises(UserError, match="a restart takes 2,000 s and a failure comes every 1,000 s"):
        best_interval(1, 1000, 2000)
    assert best_interval(1, math.inf, 300) == math.inf


def test_a_bill_adds_up() -> None:
    priced, bill = api.bill(**RUN)
    assert bill.productive_seconds == pytest.approx(RUN["tokens"] / priced.tokens_per_s)
    assert bill.wall_seconds == pytest.approx(bill.productive_seconds / bill.reliability.effective_ratio)
    assert bill.interruptions == pytest.approx(bill.wall_seconds / bill.reliability.between_failures)
    assert bill.accelerator_hours == pytest.approx(16_384 * bill.wall_seconds / HOUR)
    assert bill.checkpoint_bytes == pytest.approx(405.9e9 * 14, rel=1e-3)
    assert bill.energy is not None
    assert bill.energy.usd == pytest.approx(bill.energy.kwh * 0.10)
    assert bill.usd_hardware == pytest.approx(bill.accelerator_hours * 1.03 * 2.95)
    assert 3.0 < bill.reliability.between_failures / HOUR < 3.2, "Llama 3 was interrupted every 3.09 hours"


def test_what_the_person_knows_replaces_the_catalogue() -> None:
    _, usual = api.bill(**RUN)
    terms = Terms(failures="0.01", save_seconds=30, restart_seconds=600, usd_per_hour=2, usd_per_kwh=0.05, pue=1, spares=0)
    _, given_ = api.bill(**RUN, terms=terms)
    assert given_.reliability.between_failures < usual.reliability.between_failures
    assert given_.reliability.effective_ratio < usual.reliability.effective_ratio
    assert given_.usd_hardware == pytest.approx(given_.accelerator_hours * 2)
    assert {given_.evidence[name] for name in ("failures", "save", "restart", "price", "pue", "electricity")} == {"given"}


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"failures": "lama-3"}, "did you mean llama-3"),
        ({"pue": 0.9}, "1 or more, got 0.9"),
        ({"spares": -1}, "spares must be 0 or more, got -1"),
        ({"interval_seconds": 0}, "interval seconds must be above 0, got 0"),
        ({"interval_seconds": 30_000}, "never gets on: save every"),
        ({"interval_seconds": 10}, "writing one takes 99 s at 57.5 GB/s"),
        ({"failures": "10"}, "never gets on"),
    ],
)
def test_bad_terms_are_refused(terms: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        api.bill(**RUN, terms=Terms(**terms))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    monkeypatch.setattr("sys.argv", ["meshwright", "cost", "run", *options, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = json.loads(capsys.readouterr().out)
    assert shown["bill"]["wall_s"] > shown["bill"]["productive_s"] > 0
    monkeypatch.setattr("sys.argv", ["meshwright", "cost", "run", *options, "--every=1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
