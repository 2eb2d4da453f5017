"""The `meshwright` command: one file per verb. Bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import sys

import typer

from meshwright import __version__
from meshwright.cli import bench, catalogue, compare, cost, estimate, fabric, layout, lint, plan, trace, train, verify
from meshwright.spec.errors import UserError

app = typer.Typer(
    name="meshwright",
    help="Find the best way to split a large language model over a cluster, price it, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("fabric")(fabric.fabric)
app.command("lint")(lint.lint)
app.command("rules")(lint.rules)
app.command("trace")(trace.trace)
app.command("verify")(verify.verify)
app.command("train")(train.train)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("models")(catalogue.models)
app.command("clusters")(catalogue.clusters)
app.add_typer(cost.app, name="cost")
app.add_typer(layout.app, name="layout")


def _version(value: bool) -> None:
    if value:
        print(f"meshwright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        sys.exit(1)
