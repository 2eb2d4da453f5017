"""Options that several verbs share, and how they show results."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option("--model", help="Catalogue name, or path of a Hugging Face config.json.")]
Cluster = Annotated[str, typer.Option("--cluster", help="Catalogue name, or path of a cluster YAML.")]
Gpus = Annotated[int, typer.Option("--gpus", help="Accelerators to use.")]
Seq = Annotated[int, typer.Option("--seq", help="Tokens in a sequence.")]
GlobalBatch = Annotated[int, typer.Option("--global-batch", help="Sequences in an optimizer step.")]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="Of a rank, such as 60GiB: chooses what is recomputed to stay within it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: dict[str, Any] | list[Any]) -> None:
    print(json.dumps(value, indent=1))


def say(what: str) -> None:
    """Progress, where a person watches."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)


def show(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    # A pipe or a log has no width: give tables the room they need instead of folding them at 80 columns.
    (console if console.is_terminal else Console(width=200)).print(renderable)
