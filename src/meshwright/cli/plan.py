"""meshwright plan"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from meshwright.cli.shared import (
    AsJson,
    Cluster,
    ExpertImbalance,
    GlobalBatch,
    Gpus,
    Model,
    Seq,
    duration,
    print_json,
    show,
)

SILENT_SECONDS = 1.0


def plan(
    model: Model,
    cluster: Cluster,
    gpus: Gpus,
    seq: Seq,
    global_batch: GlobalBatch,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layouts to show.")] = 5,
    precision: Annotated[str, typer.Option("--precision", help="bf16, fp32 or fp64.")] = "bf16",
    expert_imbalance: ExpertImbalance = 1.0,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Try uneven stages and async modes on the finalists, with the recompute and offload that then fit.",
        ),
    ] = False,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also show what leaving memory free costs in speed.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also plan for one more NIC, twice the batch, half the nodes.")
    ] = False,
    objective: Annotated[
        str, typer.Option("--objective", help="time, or cost: of up to --gpus, so many that a token costs least.")
    ] = "time",
    tokens: Annotated[float | None, typer.Option("--tokens", help="Of the whole run, such as 15e12.")] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", help="Fewest of up to --gpus that make it, such as 60d.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="USD: the quickest that it pays for, such as 5e6.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Search for the best layout, and say why the others lose."""
    from meshwright.api import plan as search
    from meshwright.spec.errors import choices
    from meshwright.spec.precision import STATE_BYTES

    if precision not in STATE_BYTES:
        raise choices(precision, STATE_BYTES, "precision")
    asked: dict[str, Any] = {
        "model": model, "cluster": cluster, "gpus": gpus, "seq": seq, "global_batch": global_batch, "precision": precision,
        "expert_imbalance": expert_imbalance,
    }  # fmt: skip
    if objective != "time" or deadline or budget is not None:
        _refuse_together({"--pareto": pareto, "--sensitivity": sensitivity, "--refine": refine})
        _size(asked, objective, tokens, deadline, budget, json)
        return
    if tokens is not None:
        from meshwright.spec.errors import UserError

        raise UserError(
            "--tokens goes with --deadline, --budget or --objective cost; `meshwright cost run` bills one layout"
        )
    found = search(**asked, top=top, refine=refine, progress=_Progress())
    _show(found, asked, pareto, sensitivity, json)
    if found.best is None:
        raise typer.Exit(1)


def _show(found: Any, asked: dict[str, Any], pareto: bool, sensitivity: bool, json: bool) -> None:
    from meshwright import api
    from meshwright.report.around import pareto_report, sensitivity_report, ways_report
    from meshwright.report.plan import plan_report

    title = "{model} on {gpus} x {cluster}, {seq} tokens, global batch {global_batch}".format(**asked)
    fits = found.best is not None
    ways = [] if fits else api.ways_out(found.candidates[0].estimate, **asked)
    front = api.pareto(**asked) if fits and pareto else []
    changes = api.sensitivity(**asked) if sensitivity else []
    if json:
        rows = {"ways_out": [w.as_dict() for w in ways]} if not fits else {}
        rows |= {"pareto": [e.as_dict() for e in front]} if front else {}
        print_json(found.as_dict() | rows | ({"sensitivity": [v.as_dict() for v in changes]} if changes else {}))
        return
    show(plan_report(found, title))
    if not fits:
        show(ways_report(found.candidates[0].estimate, ways))
    if front:
        show(pareto_report(front))
    if changes:
        show(sensitivity_report(changes))


def _size(
    asked: dict[str, Any], objective: str, tokens: float | None, deadline: str | None, budget: float | None, json: bool
) -> None:
    from meshwright.api import size
    from meshwright.report.around import sizing_report

    seconds = None if deadline is None else duration(deadline)
    found = size(
        **asked, objective=objective, tokens=tokens, deadline=seconds, budget=budget, progress=_Progress("sizes planned")
    )
    if json:
        print_json(found.as_dict())
    else:
        show(sizing_report(found))
    if found.chosen is None:
        raise typer.Exit(1)


def _refuse_together(given: dict[str, bool]) -> None:
    from meshwright.spec.errors import UserError

    for option, is_given in given.items():
        if is_given:
            raise UserError(
                f"{option} is of one number of accelerators: give it without --objective, --deadline and --budget"
            )


class _Progress:
    """Counts on stderr once the search has taken longer than a second, on a terminal."""

    def __init__(self, what: str = "layouts priced") -> None:
        self.what = what
        self.began = time.monotonic()
        self.next = self.began + SILENT_SECONDS

    def __call__(self, priced: int) -> None:
        now = time.monotonic()
        if now > self.next:
            self.next = now + 0.2
            if sys.stderr.isatty():
                typer.echo(f"\r{priced:,} {self.what}", nl=False, err=True)
