"""Tables of a verification."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from meshwright.report.units import size

WORST = 5
"""Parameters shown."""


def verification_report(result: dict[str, Any]) -> Group:
    """`result`: as `verify --json` prints it."""
    title = f"{result['layout']} against one process: {result['model']}, seq {result['seq']}, global batch {result['global_batch']}"
    table = Table(title=title)
    for heading in ("what", "value", "relative error"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row("loss", f"{result['loss']:.6f}", f"{result['loss_error']:.1e}")
    table.add_row("gradient norm", f"{result['grad_norm']:.6f}", f"{result['grad_norm_error']:.1e}")
    for name, error in sorted(result["parameters"].items(), key=lambda item: -item[1])[:WORST]:
        table.add_row(f"gradient of {name}", "", f"{error:.1e}")
    traffic = Table(title="Sent in the step, all ranks together")
    for heading in ("axis", "operation", "ranks", "calls", "bytes"):
        traffic.add_column(heading, justify="left" if heading in ("axis", "operation") else "right")
    for c in result["collectives"]:
        traffic.add_row(c["axis"], c["op"], str(c["group_size"]), f"{c['count']:,}", size(c["bytes"]))
    return Group(table, traffic, *_verdict(result))


def _verdict(result: dict[str, Any]) -> list[str]:
    worst = max(result["max_relative_error"], result["loss_error"], result["grad_norm_error"])
    if result["ok"]:
        return [
            f"ok: the gradients of all {result['parameters_checked']} parameters, the loss and the norm equal those of one process "
            f"to {worst:.0e} ({result['tolerance']:.0e} allowed)"
        ]
    lines = [f"not equal: {result['worst_parameter']} is off by {result['max_relative_error']:.1e}"]
    if difference := result["first_difference"]:
        where = f"{difference['module']}, off by {difference['error']:.1e}"
        lines.append(f"they part at {where}; axes at fault: {', '.join(difference['axes'])}")
    return lines


def matrix_markdown(
    modes: tuple[str, ...], cells: dict[tuple[str, str], tuple[float, int]], layouts: int, model: str
) -> str:
    """Worst relative errors by pairs of modes, as a Markdown table."""
    lines = [f"## {model}: {layouts} layouts", "", "| | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for mode in modes:
        row = [f"{cells[mode, other][0]:.0e}" if (mode, other) in cells else "-" for other in modes]
        lines.append(f"| **{mode}** | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
