"""meshwright verify"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, print_json, show
from meshwright.spec.errors import UserError


def verify(
    layout: Annotated[str | None, typer.Option("--layout", help='One line, such as "dp2 tp2:sp pp2:zb-h1".')] = None,
    model: Annotated[str | None, typer.Option(help="Catalogue name, or path of a Hugging Face config.json.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp64 or fp32, instead of the layout's; fp64 where neither is given.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="packed (two documents a sequence, padded), whole, lopsided, or hot (a few experts).")
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Layouts that cover every pair of modes, as a table.")] = False,
    ranks: Annotated[int | None, typer.Option(help="Of the matrix: the largest world (8).")] = None,
    count: Annotated[int | None, typer.Option(help="Of the matrix: at least so many layouts of each kind.")] = None,
    out: Annotated[str | None, typer.Option(help="Of the matrix: Markdown file to write.")] = None,
    json: AsJson = False,
) -> None:
    """Prove on this machine that a layout computes the gradients of one process."""
    if matrix == (layout is not None):
        raise UserError("verify takes either --layout or --matrix: try --layout 'dp2 tp2:sp pp2'")
    if layout is not None:
        for name, given in (("ranks", ranks), ("count", count), ("out", out)):
            if given is not None:
                raise UserError(f"--{name} {given} is of the matrix: leave it out, or take --matrix instead of --layout")
        ok = _one(layout, model, precision, batch, json)
    else:
        if batch is not None:
            raise UserError(f"--batch {batch} is of one layout: the matrix takes every kind in turn, so leave it out")
        ok = _matrix(model, count or 0, 8 if ranks is None else ranks, precision, out, json)
    raise typer.Exit(0 if ok else 1)


def _one(layout: str, model: str | None, precision: str | None, batch: str | None, json: bool) -> bool:
    from meshwright.report.verify import verification_report
    from meshwright.verify.run import verify as run

    result = run(layout, model, precision, batch).as_dict()
    print_json(result) if json else show(verification_report(result))
    return bool(result["ok"])


def _matrix(model: str | None, count: int, ranks: int, precision: str | None, out: str | None, json: bool) -> bool:
    from pathlib import Path

    from meshwright.report.verify import matrix_markdown
    from meshwright.spec.files import write_text_atomically
    from meshwright.verify.run import verify_matrix

    found = [matrix.as_dict() for matrix in verify_matrix(model, count, ranks, precision)]
    text = matrix_markdown(found)
    if out is not None:
        write_text_atomically(Path(out), text)
    ok = all(one["ok"] for one in found)
    print_json({"ok": ok, "matrices": found}) if json else print(text)
    return ok
