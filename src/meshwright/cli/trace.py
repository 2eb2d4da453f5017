"""meshwright trace"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, GlobalBatch, Model, Seq, print_json, say, show
from meshwright.spec.errors import UserError


def trace(
    model: Model,
    seq: Seq,
    global_batch: GlobalBatch,
    layout: Annotated[str, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')],
    gpus: Annotated[int | None, typer.Option("--gpus", help="Checked against the layout.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="One rank of the world.")] = None,
    stage: Annotated[int | None, typer.Option("--stage", help="The first rank of one stage.")] = None,
    all_stages: Annotated[bool, typer.Option("--all-stages", help="Of every stage; by default one of each kind.")] = False,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the fullest stage's memory through the step to this PNG or SVG.")
    ] = None,
    chrome: Annotated[str | None, typer.Option("--chrome", help="Write events for Perfetto or chrome://tracing.")] = None,
    json: AsJson = False,
) -> None:
    """Dry-run the real engine at any scale in one process: memory, products and communication of one step."""
    from pathlib import Path

    from meshwright.api import trace as run
    from meshwright.report.trace import trace_report
    from meshwright.spec.notation import parse_layout

    if (rank is not None) + (stage is not None) + all_stages > 1:
        raise UserError("trace takes one of --rank, --stage and --all-stages")
    parsed = parse_layout(layout)
    stages = list(range(parsed.pp)) if all_stages else None if stage is None else [stage]
    ranks = None if rank is None else [rank]
    traced = run(
        model=model, layout=parsed, gpus=gpus, seq=seq, global_batch=global_batch, ranks=ranks, stages=stages, progress=say
    )
    if json:
        print_json(traced.as_dict())
    else:
        show(trace_report(traced))
    if plot:
        from meshwright.report.memory_plot import plot_memory

        plot_memory(traced.fullest, Path(plot), f"{traced.model}: {traced.layout}")
    if chrome:
        from meshwright.export.chrome import write_chrome

        write_chrome(traced, Path(chrome))
