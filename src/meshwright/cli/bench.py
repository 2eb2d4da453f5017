"""meshwright bench"""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def bench(
    out: Annotated[str, typer.Option("--out", help="Where to write the measured cluster.")] = "cluster.yaml",
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes (one a GPU where there are GPUs).")] = 4,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About how long to measure.")] = 60.0,
) -> None:
    """Measure this machine: matmul and attention rates, memory bandwidth, collectives. `plan` uses the result."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from meshwright.probe.bench import measure_cluster
    from meshwright.spec.catalogue import dump_cluster
    from meshwright.spec.files import write_text_atomically

    columns = (TextColumn("measuring {task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("this machine", total=1.0)
        cluster = measure_cluster(
            ranks,
            seconds=seconds,
            base=None,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    write_text_atomically(out, dump_cluster(cluster))
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in cluster.accelerator.peak_flops.items())
    print(f"{out}: {rates} a rank alone; {cluster.source}")
    sys.stdout.flush()
