"""meshwright trace"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, Seq, print_json, say, show
from meshwright.spec.errors import UserError


def trace(
    seq: Seq,
    model: Annotated[
        str | None, typer.Option("--model", help="Catalogue name, or path of a Hugging Face config.json.")
    ] = None,
    global_batch: Annotated[int | None, typer.Option("--global-batch", help="Sequences in an optimizer step.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help='One line, such as "dp20:zero1 tp8:sp pp4 mb1".')] = None,
    hf: Annotated[
        str | None,
        typer.Option(
            "--hf", help="Instead of --model: a config of any causal model of transformers, run as it is on one device."
        ),
    ] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", help="With --hf: sequences.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="With --hf: bf16, fp32 or mixed.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="With --hf: its gradient checkpointing.")] = False,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Checked against the layout.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="One rank of the world.")] = None,
    stage: Annotated[int | None, typer.Option("--stage", help="The first rank of one stage.")] = None,
    all_stages: Annotated[bool, typer.Option("--all-stages", help="Of every stage; by default one of each kind.")] = False,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the fullest stage's memory through the step to this PNG or SVG.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Price events on this cluster, and hold the peak against its accelerator's memory."),
    ] = None,
    chrome: Annotated[
        str | None,
        typer.Option(
            "--chrome", help="Write events for Perfetto; their times are seconds with --cluster, else their order."
        ),
    ] = None,
    chakra: Annotated[
        str | None,
        typer.Option("--chakra", help="Write Chakra execution traces, one a rank, and their groups into this directory."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Dry-run the real engine at any scale in one process: memory, products and communication of one step."""
    plain = {"--micro-batch": micro_batch, "--precision": precision, "--recompute": recompute}
    sharded = {"--model": model, "--global-batch": global_batch, "--layout": layout}
    if hf is not None:
        others = {"--gpus": gpus, "--rank": rank, "--stage": stage, "--all-stages": all_stages, "--plot": plot}
        others |= {"--cluster": cluster, "--chrome": chrome, "--chakra": chakra}
        _refuse(sharded | others, "is not for --hf, which runs a model as it is on one device")
        _plain(hf, seq, micro_batch or 1, precision or "bf16", recompute, json)
        return
    _refuse(plain, "is for --hf; --layout says it otherwise, such as mb2, fp32 and ac:full")
    if model is None or global_batch is None or layout is None:
        missing = ", ".join(name for name, value in sharded.items() if value is None)
        raise UserError(f"trace misses {missing}: it needs --model, --global-batch and --layout, or --hf")
    from pathlib import Path

    from meshwright.api import trace as run
    from meshwright.report.trace import trace_report
    from meshwright.spec.catalogue import load_cluster
    from meshwright.spec.huggingface import load_model
    from meshwright.spec.notation import parse_layout
    from meshwright.trace.seconds import Prices
    from meshwright.trace.timeline import in_order, in_seconds

    if (rank is not None) + (stage is not None) + all_stages > 1:
        raise UserError("trace takes one of --rank, --stage and --all-stages")
    parsed, known = parse_layout(layout), load_model(model)
    every = all_stages or (chakra is not None and rank is None and stage is None)
    stages = list(range(parsed.pp)) if every else None if stage is None else [stage]
    ranks = None if rank is None else [rank]
    traced = run(
        model=known, layout=parsed, gpus=gpus, seq=seq, global_batch=global_batch, ranks=ranks, stages=stages, progress=say
    )
    prices = None if cluster is None else Prices(traced, known, load_cluster(cluster))
    if json:
        print_json(traced.as_dict() | ({} if prices is None else prices.as_dict()))
    else:
        show(trace_report(traced, prices))
    if plot:
        from meshwright.report.memory_plot import plot_memory

        plot_memory(traced.fullest, Path(plot), f"{traced.model}: {traced.layout}")
    if chrome:
        from meshwright.export.chrome import ORDER, PREDICTED, write_chrome

        timelines = in_order(traced) if prices is None else in_seconds(traced, known, prices)
        write_chrome(traced, timelines, Path(chrome), ORDER if prices is None else PREDICTED)
    if chakra:
        from meshwright.export.chakra import write_chakra

        write_chakra(traced, known, Path(chakra), ranks, None if prices is None else prices.of)


def _refuse(given: dict[str, object], why: str) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"{name} {why}")


def _plain(ref: str, seq: int, micro_batch: int, precision: str, recompute: bool, json: bool) -> None:
    from meshwright.api import trace_huggingface
    from meshwright.report.plain import plain_dict, plain_report

    traced = trace_huggingface(config=ref, seq=seq, micro_batch=micro_batch, precision=precision, recompute=recompute)
    ran = f"{micro_batch} x {seq:,} tokens, {precision}" + (", recompute" if recompute else "")
    if json:
        print_json(plain_dict(ref, ran, traced))
    else:
        show(plain_report(ref, ran, traced))
