"""Options that several verbs share, and how they show results."""

from __future__ import annotations

import json
import re
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
ExpertImbalance = Annotated[
    float,
    typer.Option("--expert-imbalance", help="Rows of the fullest expert over the mean, as training logs them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


def duration(text: str) -> float:
    """Seconds of such as 90s, 30min, 1.5h or 60d. Raises UserError for anything else."""
    from meshwright.spec.errors import UserError

    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|min|h|d)", text)
    if not match or not float(match[1]):
        raise UserError(f"{text!r} is no duration above 0: write a number and s, min, h or d, such as 90s, 1.5h or 60d")
    return float(match[1]) * UNITS[match[2]]


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
