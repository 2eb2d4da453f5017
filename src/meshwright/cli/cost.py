"""meshwright cost"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, GlobalBatch, Model, Seq, print_json, show

app = typer.Typer(help="Hours, energy, money and failures.", no_args_is_help=True, rich_markup_mode=None)
PowerPrice = Annotated[float | None, typer.Option("--power-price", help="USD a kWh.")]


@app.command()
def run(
    model: Model,
    cluster: Cluster,
    seq: Seq,
    global_batch: GlobalBatch,
    layout: Annotated[str, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')],
    tokens: Annotated[float, typer.Option("--tokens", help="Of the whole run, such as 15e12.")],
    price: Annotated[float | None, typer.Option("--price", help="USD an accelerator hour.")] = None,
    power_price: PowerPrice = None,
    pue: Annotated[float | None, typer.Option("--pue", help="What the building draws over what the machines draw.")] = None,
    spares: Annotated[float | None, typer.Option("--spares", help="Share of nodes kept idle.")] = None,
    failures: Annotated[
        str | None, typer.Option("--failures", help="Of a node in a day: a number, or llama-3, rsc-1, rsc-2.")
    ] = None,
    save: Annotated[float | None, typer.Option("--save", help="Seconds that training waits for a checkpoint.")] = None,
    storage: Annotated[float | None, typer.Option("--storage", help="Bytes/s of the job's storage, such as 2e12.")] = None,
    restart: Annotated[float | None, typer.Option("--restart", help="Seconds that a failure keeps it.")] = None,
    every: Annotated[float | None, typer.Option("--every", help="Seconds between checkpoints. Default: the best.")] = None,
    json: AsJson = False,
) -> None:
    """What a whole training run costs under a layout, failures and checkpoints included."""
    from meshwright.api import bill
    from meshwright.planner.bill import Terms
    from meshwright.report.bill import bill_report

    terms = Terms(failures, save, storage, restart, every, price, power_price, pue, spares)
    priced, made = bill(
        model=model, cluster=cluster, layout=layout, seq=seq, global_batch=global_batch, tokens=tokens, terms=terms
    )
    if json:
        print_json({"estimate": priced.as_dict(), "bill": made.as_dict()})
    else:
        show(bill_report(made, priced))


@app.command()
def power(
    gpus: Annotated[int, typer.Option("--gpus", help="Accelerators.", min=1)],
    watts: Annotated[float, typer.Option("--watts", help="That each draws.", min=0)],
    days: Annotated[float, typer.Option("--days", min=0)],
    power_price: PowerPrice = None,
    pue: Annotated[float, typer.Option("--pue", help="What the building draws over what the machines draw.", min=1)] = 1.0,
    json: AsJson = False,
) -> None:
    """Power and energy of so many accelerators for so long."""
    from meshwright.cost.economics import DAY, energy
    from meshwright.report.bill import energy_report
    from meshwright.spec.economics import load_economic_constants

    usd = load_economic_constants().usd_per_kwh.value if power_price is None else power_price
    drawn = energy(gpus, watts, days * DAY, usd, pue=pue)
    if json:
        print_json({"watts": drawn.watts, "kwh": drawn.kwh, "usd": drawn.usd, "usd_per_kwh": usd})
    else:
        show(energy_report(gpus, watts, days, drawn, usd))
