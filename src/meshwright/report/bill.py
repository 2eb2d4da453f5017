"""What a run costs, as a table."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.economics import DAY, HOUR, Bill, Energy, daly_interval, young_interval
from meshwright.cost.result import Estimate
from meshwright.report.units import count, percent, size


def bill_report(bill: Bill, estimate: Estimate) -> RenderableType:
    title = (
        f"{count(bill.tokens)} tokens of {estimate.model} on {bill.accelerators:,} x {estimate.cluster}: {estimate.layout}"
    )
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for row in (*_time_rows(bill, estimate), *_checkpoint_rows(bill), *_money_rows(bill)):
        table.add_row(*row)
    rests = "\n          ".join(f"{what}: {source}" for what, source in bill.evidence.items())
    return Group(table, Text(), Text("rests on  " + rests, style="dim"))


def energy_report(accelerators: int, watts: float, days: float, energy: Energy, usd_per_kwh: float) -> RenderableType:
    return Text(
        f"{accelerators:,} accelerators x {watts:g} W for {days:g} days: {power(energy.watts)}, "
        f"{amount(energy.kwh)}, {money(energy.usd)} at {usd_per_kwh:g} USD/kWh"
    )


def _time_rows(bill: Bill, estimate: Estimate) -> list[tuple[str, str]]:
    return [
        ("throughput", f"{estimate.tokens_per_s:,.0f} tokens/s"),
        ("time", f"{duration(bill.wall_seconds)}, of it {duration(bill.productive_seconds)} productive"),
        ("accelerator hours", f"{count(bill.accelerator_hours)} h"),
    ]


def _checkpoint_rows(bill: Bill) -> list[tuple[str, str]]:
    r = bill.reliability
    if math.isinf(r.between_failures):
        return [("failures", "none")]
    nodes = f"{r.nodes:,} node{'s' if r.nodes > 1 else ''}"
    known = f"Young {duration(young_interval(r.save, r.between_failures))}"
    if r.save < r.between_failures / 2:
        known += f", Daly {duration(daly_interval(r.save, r.between_failures))}"
    return [
        ("failures", f"one every {duration(r.between_failures)} on {nodes}, {bill.interruptions:,.0f} in all"),
        (
            "checkpoint",
            f"{size(bill.checkpoint_bytes)}; training waits {duration(r.save)}, storage takes {duration(r.write)}",
        ),
        ("checkpoint every", f"{duration(r.interval)}; best {duration(r.best_interval)} ({known})"),
        ("restart", duration(r.restart)),
        ("effective time", f"{percent(r.effective_ratio)} of the wall clock" + _better(bill)),
    ]


def _better(bill: Bill) -> str:
    r = bill.reliability
    return f"; {percent(r.best_ratio)} at the best interval" if r.best_ratio - r.effective_ratio > 5e-4 else ""


def _money_rows(bill: Bill) -> list[tuple[str, str]]:
    out = []
    if bill.energy:
        out.append(("energy", f"{power(bill.energy.watts)}, {amount(bill.energy.kwh)}, {money(bill.energy.usd)}"))
    out.append(
        ("accelerators", money(bill.usd_hardware) if bill.usd_hardware is not None else "no price known: give --price")
    )
    return out


def duration(seconds: float) -> str:
    for unit, scale in (("days", DAY), ("h", HOUR), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.3g} s"


def power(watts: float) -> str:
    for unit, scale in (("MW", 1e6), ("kW", 1e3)):
        if watts >= scale:
            return f"{watts / scale:.4g} {unit}"
    return f"{watts:.4g} W"


def amount(kwh: float) -> str:
    """Electrical energy."""
    for unit, scale in (("GWh", 1e6), ("MWh", 1e3)):
        if kwh >= scale:
            return f"{kwh / scale:.4g} {unit}"
    return f"{kwh:.4g} kWh"


def money(usd: float) -> str:
    return f"{count(usd)} USD"
