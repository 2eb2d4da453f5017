"""Tables of a verification."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from meshwright.report.units import size

WORST = 5
"""Parameters shown."""

_MEANING = {
    "forward": "the output of {} is off by {}",
    "backward": "forward agrees, then backward through {} is off by {}",
    "parameter": "what goes between operators agrees, the gradient of {} is off by {}",
    "figure": "all gradients agree, the {} is off by {}",
}


def verification_report(result: dict[str, Any]) -> Group:
    """`result`: as `verify --json` prints it."""
    shrunk = result["shrunk"]
    table = Table(title=f"{result['layout']} against one process", title_justify="left")
    for heading in ("what", "value", "relative error"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row("loss", _number(result["loss"]), _error(result["loss_error"]))
    table.add_row("gradient norm", _number(result["grad_norm"]), _error(result["grad_norm_error"]))
    for name in _worst(result["parameters"]):
        table.add_row(f"gradient of {name}", "", _error(result["parameters"][name]))
    model = Text(
        f"{result['model']} shrunk to {shrunk['layers']} layers of {shrunk['hidden']}, {shrunk['heads']} heads "
        f"({shrunk['kv_heads']} of keys and values), {shrunk['parameters']:,} parameters; "
        f"{result['global_batch']} sequences of {result['seq']} tokens"
    )
    return Group(model, table, _traffic(result["collectives"]), Text(_verdict(result)))


def _traffic(collectives: list[dict[str, Any]]) -> Table:
    table = Table(title="sent in the step, all ranks together", title_justify="left")
    for heading in ("axis", "operation", "ranks", "calls", "bytes"):
        table.add_column(heading, justify="left" if heading in ("axis", "operation") else "right")
    for c in collectives:
        table.add_row(c["axis"], c["op"], str(c["group_size"]), f"{c['count']:,}", size(c["bytes"]))
    return table


def _verdict(result: dict[str, Any]) -> str:
    if result["ok"]:
        worst = max(result["max_relative_error"], result["loss_error"], result["grad_norm_error"])
        return (
            f"ok: the gradients of all {len(result['parameters'])} parameters, the loss and the norm equal those of one process "
            f"to {worst:.0e} ({result['tolerance']:.0e} allowed)"
        )
    difference = result["first_difference"]
    where = _MEANING[difference["phase"]].format(difference["operator"], _error(difference["error"]))
    axes = difference["axes"]
    fault = f"axes at fault: {', '.join(axes)}" if axes else "no axis is at fault: it goes wrong on one rank as well"
    worst = f"{result['worst_parameter']}, off by {_error(result['max_relative_error'])}"
    return f"not equal ({result['tolerance']:.0e} allowed): {where}\n{fault}\nworst gradient: {worst}"


def _worst(parameters: dict[str, float | None]) -> list[str]:
    def key(name: str) -> float:
        error = parameters[name]
        return float("inf") if error is None else error

    return sorted(parameters, key=key, reverse=True)[:WORST]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6f}"


def _error(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"


def matrix_markdown(matrix: dict[str, Any]) -> str:
    """`matrix`: as `verify --matrix --json` prints it. Worst relative errors by pairs of modes, with a note for each empty cell."""
    errors = {tuple(cell["modes"]): _error(cell["error"]) for cell in matrix["cells"]}
    reasons = {tuple(cell["modes"]): cell["reason"] for cell in matrix["empty"]}
    notes = {reason: f"[{number}]" for number, reason in enumerate(dict.fromkeys(reasons.values()), start=1)}
    modes = list(dict.fromkeys(mode for mode, _ in [*errors, *reasons]))
    lines = [f"## {matrix['model']}, {matrix['precision']}: {matrix['layouts']} layouts", ""]
    lines += ["| | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for mode in modes:
        row = [errors.get((mode, other)) or f"- {notes[reasons[mode, other]]}" for other in modes]
        lines.append(f"| **{mode}** | " + " | ".join(row) + " |")
    lines += ["", *(f"- {note} {reason}" for reason, note in notes.items())] if notes else []
    lines += ["", *(f"- not equal: `{layout}`" for layout in matrix["failed"])] if matrix["failed"] else []
    return "\n".join(lines) + "\n"
