"""meshwright lint"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Cluster, GlobalBatch, Model, Seq, duration, print_json, show


def lint(
    model: Model,
    cluster: Cluster,
    seq: Seq,
    global_batch: GlobalBatch,
    layout: Annotated[str, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')],
    gpus: Annotated[int | None, typer.Option("--gpus", help="That the layout should fill.")] = None,
    attention: Annotated[
        str, typer.Option("--attention", help="flash, flash2, flash1, fused-softmax or unfused.")
    ] = "flash",
    grouped_gemm: Annotated[str, typer.Option("--grouped-gemm", help="on or off: one kernel for all experts.")] = "on",
    loss_scaling: Annotated[str, typer.Option("--loss-scaling", help="on or off, in fp16.")] = "on",
    bucket: Annotated[
        float | None, typer.Option("--bucket", help="Bytes of a gradient bucket. Default: the engine's.")
    ] = None,
    checkpoint_interval: Annotated[
        str | None, typer.Option("--checkpoint-interval", help="Between checkpoints, such as 30min or 1h.")
    ] = None,
    save: Annotated[float | None, typer.Option("--save", help="Seconds that training waits for a checkpoint.")] = None,
    failures: Annotated[
        str | None, typer.Option("--failures", help="Of a node in a day: a number, or llama-3, rsc-1, rsc-2.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Run every rule on a layout: what is wrong with it, what that costs here, and the repair. Exit status 1 on errors."""
    from meshwright.api import lint as check
    from meshwright.report.lint import lint_report

    linted = check(
        model=model, cluster=cluster, layout=layout, seq=seq, global_batch=global_batch, gpus=gpus,
        attention=attention, grouped_gemm=_switch("--grouped-gemm", grouped_gemm),
        loss_scaling=_switch("--loss-scaling", loss_scaling), bucket_bytes=bucket, save_seconds=save, failures=failures,
        checkpoint_interval=None if checkpoint_interval is None else duration(checkpoint_interval),
    )  # fmt: skip
    if json:
        print_json(linted.as_dict())
    else:
        show(
            lint_report(linted, f"{model} on {linted.layout.world} x {cluster}, {seq} tokens, global batch {global_batch}")
        )
    if not linted.sound:
        raise typer.Exit(1)


def rules(json: AsJson = False) -> None:
    """List the rules of lint, each with the documentation behind it."""
    from meshwright.planner.lint import RULES
    from meshwright.report.lint import rules_report

    if json:
        print_json([{"rule": r.name, "looks_for": r.looks_for, "source": r.source} for r in RULES])
    else:
        show(rules_report())


def _switch(option: str, given: str) -> bool:
    from meshwright.spec.errors import choices

    if given not in ("on", "off"):
        raise choices(given, ("on", "off"), f"value of {option}")
    return given == "on"
