"""meshwright train"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from meshwright.cli.shared import MemoryBudget


def train(
    recipe: Annotated[str | None, typer.Argument(help="YAML recipe; flags override its keys.")] = None,
    model: Annotated[str | None, typer.Option(help="Catalogue name, or path of a Hugging Face config.json.")] = None,
    layout: Annotated[str | None, typer.Option(help='One line, such as "dp2 tp2:sp pp2:1f1b mb1 fp32".')] = None,
    schedule_csv: Annotated[str | None, typer.Option(help="A pipeline schedule of your own, one row a stage.")] = None,
    data: Annotated[
        str | None, typer.Option(help="File, directory or glob: text, JSONL, Parquet. Default: Python's own library.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json. Default: bytes.")] = None,
    memory_budget: MemoryBudget = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Sequences in an optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest global gradient norm.")] = None,
    aux_loss: Annotated[float | None, typer.Option(help="Factor of the experts' auxiliary balancing loss.")] = None,
    z_loss: Annotated[float | None, typer.Option(help="Factor of the router's z-loss.")] = None,
    bias_rate: Annotated[float | None, typer.Option(help="Step of the loss-free balancing bias.")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="Drop what is over this multiple of an even load.")] = None,
    expert_choice: Annotated[bool | None, typer.Option("--expert-choice", help="Experts choose tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the order of the data.")] = None,
    init: Annotated[str | None, typer.Option(help="Hugging Face safetensors directory to start from.")] = None,
    cluster: Annotated[str | None, typer.Option(help="What MFU is measured against.")] = None,
    out: Annotated[str | None, typer.Option(help="Where checkpoints, metrics, report and plot go.")] = None,
    offload_dir: Annotated[
        str | None, typer.Option(help="Where offload@file keeps its files. Default: offload in --out.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: only at the end.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the newest checkpoint, whatever its layout.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Write the weights here at the end, as Hugging Face safetensors.")
    ] = None,
    json_log: Annotated[str | None, typer.Option(help="Metrics, one JSON object a step.")] = None,
) -> None:
    """Train a model under a layout, on local processes or under torchrun or Slurm."""
    overrides = {name: value for name, value in locals().items() if name != "recipe"}
    from meshwright.train.recipe import fit_memory, load_recipe

    parsed = load_recipe(recipe, overrides)
    checked = parsed.check()
    parsed, fitted = fit_memory(parsed)

    from meshwright.parallel.fp8 import refuse_fp8
    from meshwright.train.launch import RankFailed, is_first_rank, launch, leave_outer_launcher, local_ranks, rank_device
    from meshwright.train.loop import peak_flops
    from meshwright.train.loop import train as run
    from meshwright.train.room import check_machine_room, check_offload_room

    world = parsed.parsed_layout.world
    here = local_ranks(os.environ, world)
    check_machine_room(checked, parsed.parsed_layout, parsed.workload, here)
    check_offload_room(checked, parsed.parsed_layout, parsed.workload, here, parsed.offload_path)
    if parsed.parsed_layout.precision == "fp8":
        refuse_fp8(rank_device())

    if fitted is not None and is_first_rank(os.environ):
        from meshwright.report.recompute import fitted_line

        typer.echo(fitted_line(fitted), err=True)
    try:
        launch(run, world, parsed, peak_flops(parsed))
    except RankFailed as error:
        print(f"{error.details}error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if is_first_rank(os.environ):
        from meshwright.report.plots import plot_loss

        plot_loss(parsed.log_path, parsed.out_dir / "loss.png")
        typer.echo(f"metrics {parsed.log_path}, loss plot, checkpoint and report in {parsed.out}", err=True)
    leave_outer_launcher()
