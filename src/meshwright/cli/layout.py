"""meshwright layout"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, GlobalBatch, Model, Seq, print_json, show

app = typer.Typer(help="Work with layouts.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def explain(
    layout: Annotated[str, typer.Argument(help='One line, such as "dp2 tp2:sp".')],
    json: AsJson = False,
) -> None:
    """Say what a layout means, rank by rank."""
    from meshwright.report.catalogue import layout_dict, layout_report
    from meshwright.spec.notation import parse_layout

    parsed = parse_layout(layout)
    if json:
        print_json(layout_dict(parsed))
    else:
        show(layout_report(parsed))


@app.command()
def grammar() -> None:
    """Show how a layout is written."""
    from meshwright.spec.notation import EXAMPLE, GRAMMAR

    print(GRAMMAR)
    print(f"\nfor example: {EXAMPLE}")


@app.command()
def balance(
    layout: Annotated[str, typer.Argument(help='One line with a pipeline, such as "dp8 pp4 mb1".')],
    model: Model,
    cluster: Cluster,
    seq: Seq,
    global_batch: GlobalBatch,
    json: AsJson = False,
) -> None:
    """Cut the pipeline into stages of equal cost instead of equal depth."""
    from meshwright.api import balance as cut
    from meshwright.report.stages import balanced_dict, balanced_report

    balanced = cut(layout=layout, model=model, cluster=cluster, seq=seq, global_batch=global_batch)
    if json:
        print_json(balanced_dict(balanced))
    else:
        show(balanced_report(balanced))
