"""meshwright verify"""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.cli.shared import AsJson, print_json, show
from meshwright.spec.errors import UserError


def verify(
    layout: Annotated[str | None, typer.Option("--layout", help='One line, such as "dp2 tp2:sp pp2:zb-h1".')] = None,
    model: Annotated[str | None, typer.Option(help="Catalogue name, or path of a Hugging Face config.json.")] = None,
    precision: Annotated[str, typer.Option(help="fp64 or fp32.")] = "fp64",
    matrix: Annotated[bool, typer.Option("--matrix", help="Layouts that cover every pair of modes, as a table.")] = False,
    ranks: Annotated[int, typer.Option(help="Of the matrix: the largest world.")] = 8,
    count: Annotated[int, typer.Option(help="Of the matrix: at least so many layouts.")] = 1,
    out: Annotated[str | None, typer.Option(help="Of the matrix: Markdown file to write.")] = None,
    json: AsJson = False,
) -> None:
    """Prove on this machine that a layout computes the gradients of one process."""
    if matrix == (layout is not None):
        raise UserError("verify takes either --layout or --matrix: try --layout 'dp2 tp2:sp pp2'")
    if layout is not None:
        from meshwright.report.verify import verification_report
        from meshwright.verify.run import verify as run

        result = run(layout, model, precision).as_dict()
        print_json(result) if json else show(verification_report(result))
        raise typer.Exit(0 if result["ok"] else 1)

    from pathlib import Path

    from meshwright.report.verify import matrix_markdown
    from meshwright.spec.files import write_text_atomically
    from meshwright.verify.run import verify_matrix

    found = verify_matrix(model, count, ranks)
    text = matrix_markdown(found.modes, found.cells, found.layouts, found.model)
    if out is not None:
        write_text_atomically(Path(out), text)
    print_json(found.as_dict()) if json else print(text)
    for failure in found.failed:
        print(f"not equal: {failure.layout}", flush=True)
    raise typer.Exit(1 if found.failed else 0)
