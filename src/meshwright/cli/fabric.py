"""meshwright fabric"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, GlobalBatch, Model, Seq, print_json, show

LISTED = 20


def fabric(
    model: Model,
    cluster: Cluster,
    seq: Seq,
    global_batch: GlobalBatch,
    layout: Annotated[str, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')],
    gpus: Annotated[int | None, typer.Option("--gpus", help="Checked against the layout.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option("--what-if", help="lose-link, lose-nic, slow-gpu=0.8 or shuffle-nodes; as often as you like."),
    ] = None,
    orders: Annotated[bool, typer.Option("--orders", help="Try every rank order.")] = False,
    slower: Annotated[
        float, typer.Option("--slower", help="Share of the step that tolerated oversubscription may cost.")
    ] = 0.01,
    queue_pairs: Annotated[
        int | None, typer.Option("--queue-pairs", help="Of a connection, where flows are hashed to links.")
    ] = None,
    links: Annotated[
        bool, typer.Option("--links", help=f"List the {LISTED} busiest links; with --json every link.")
    ] = False,
    graph: Annotated[
        str | None, typer.Option("--graph", help="Write the links and what they carry as GraphML to this file.")
    ] = None,
    json: AsJson = False,
) -> None:
    """What a layout puts on the links between accelerators, and what those make of its step."""
    from meshwright.api import fabric as view
    from meshwright.report.fabric import fabric_report

    seen = view(
        model=model, cluster=cluster, gpus=gpus, seq=seq, global_batch=global_batch, layout=layout,
        what_if=what_if or (), orders=orders, slower=slower, queue_pairs=queue_pairs,
    )  # fmt: skip
    if json:
        print_json(seen.as_dict(links=None if links else 0))
    else:
        show(fabric_report(seen, LISTED if links else 0))
    if graph:
        from meshwright.cost.fabric.graph import graphml
        from meshwright.spec.files import write_text_atomically

        write_text_atomically(graph, graphml(seen.graph(limit=None)))
