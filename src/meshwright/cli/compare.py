"""meshwright compare"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, print_json, show


def compare(
    runs: Annotated[list[str], typer.Argument(help="Output directories of `meshwright train`.")],
    cluster: Cluster,
    json: AsJson = False,
) -> None:
    """Put the plan's figures beside the measured ones of finished runs."""
    from meshwright.report.compare import compare_run, compare_table

    rows = [row for run in runs for row in compare_run(run, cluster)]
    if json:
        print_json([row.as_dict() for row in rows])
    else:
        show(compare_table(rows))
