"""meshwright estimate"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meshwright.cli.shared import (
    AsJson,
    Cluster,
    ExpertImbalance,
    GlobalBatch,
    MemoryBudget,
    Model,
    Seq,
    print_json,
    say,
    show,
)


def estimate(
    model: Model,
    cluster: Cluster,
    seq: Seq,
    global_batch: GlobalBatch,
    layout: Annotated[str, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')],
    gpus: Annotated[int | None, typer.Option("--gpus", help="Checked against the layout.")] = None,
    expert_imbalance: ExpertImbalance = 1.0,
    memory_budget: MemoryBudget = None,
    timeline: Annotated[
        str | None, typer.Option("--timeline", help="Draw the pipeline timeline to this PNG or SVG.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Dry-run the engine (`trace`) and print where the estimate differs from it.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Price one layout: memory, communication, time."""
    if check:
        if expert_imbalance != 1.0:
            from meshwright.spec.errors import UserError

            raise UserError(
                "--check compares with a dry run, whose experts get equal rows: give it without --expert-imbalance"
            )
        _check(model, layout, seq, global_batch, json)
        return
    from meshwright.api import estimate as price
    from meshwright.api import recompute
    from meshwright.report.estimate import estimate_report
    from meshwright.report.recompute import fitted_dict, fitted_line

    asked: dict[str, Any] = {
        "model": model, "cluster": cluster, "seq": seq, "global_batch": global_batch, "expert_imbalance": expert_imbalance
    }  # fmt: skip
    chosen, line = {}, None
    if memory_budget is not None:
        fitted = recompute(**asked, layout=layout, memory_budget=memory_budget)
        layout, chosen, line = str(fitted.best.layout), {"memory_budget": fitted_dict(fitted)}, fitted_line(fitted)
    priced = price(**asked, gpus=gpus, layout=layout)
    if json:
        print_json(priced.as_dict() | chosen)
    else:
        if line is not None:
            show(line)
        show(estimate_report(priced))
    if timeline and priced.timeline:
        from pathlib import Path

        from meshwright.report.plots import plot_timeline

        plot_timeline(priced.timeline, Path(timeline), str(priced.layout))


def _check(model: str, layout: str, seq: int, global_batch: int, json: bool) -> None:
    from meshwright.api import check
    from meshwright.report.trace import check_dict, check_report

    checks = check(model=model, layout=layout, seq=seq, global_batch=global_batch, progress=say)
    if json:
        print_json(check_dict(checks))
    else:
        show(check_report(checks))
    raise typer.Exit(1 if any(one.differences for one in checks) else 0)
