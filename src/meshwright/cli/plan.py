"""meshwright plan"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, GlobalBatch, Gpus, Model, Seq, print_json, show

SILENT_SECONDS = 1.0


def plan(
    model: Model,
    cluster: Cluster,
    gpus: Gpus,
    seq: Seq,
    global_batch: GlobalBatch,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layouts to show.")] = 5,
    precision: Annotated[str, typer.Option("--precision", help="bf16, fp32 or fp64.")] = "bf16",
    json: AsJson = False,
) -> None:
    """Search for the best layout, and say why the others lose."""
    from meshwright.api import plan as search
    from meshwright.report.plan import plan_report
    from meshwright.spec.errors import choices
    from meshwright.spec.precision import STATE_BYTES

    if precision not in STATE_BYTES:
        raise choices(precision, STATE_BYTES, "precision")

    found = search(
        model=model, cluster=cluster, gpus=gpus, seq=seq, global_batch=global_batch, top=top,
        precision=precision, progress=_Progress(),  # type: ignore[arg-type]
    )  # fmt: skip
    if json:
        print_json(found.as_dict())
    else:
        show(plan_report(found, f"{model} on {gpus} x {cluster}, {seq} tokens, global batch {global_batch}"))
    if found.best is None:
        raise typer.Exit(1)


class _Progress:
    """Counts on stderr once the search has taken longer than a second, on a terminal."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.next = self.began + SILENT_SECONDS

    def __call__(self, priced: int) -> None:
        now = time.monotonic()
        if now > self.next:
            self.next = now + 0.2
            if sys.stderr.isatty():
                typer.echo(f"\r{priced:,} layouts priced", nl=False, err=True)
