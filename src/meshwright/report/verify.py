"""Tables of a verification."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from meshwright.report.units import size

WORST = 5
"""Parameters shown."""

_PRODUCTS = ("q", "k", "v", "qkv", "out", "gate", "up", "gate_up", "down", "q_down", "q_up", "kv_down", "kv_up", "head")
_KINDS = {
    **dict.fromkeys(_PRODUCTS, "product"),
    **dict.fromkeys(("norm", "attention_norm", "mlp_norm"), "norm"),
    "embedding": "embedding",
    "router": "router",
    "dispatch": "routed experts",
    "moe": "sum of experts",
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
    where = f"{_where(difference)} is off by {_error(difference['error'])}"
    if difference["cause"] is not None:
        where += f": {difference['cause']}"
    axes = difference["axes"]
    fault = f"axes at fault: {', '.join(axes)}" if axes else "no axis is at fault: it goes wrong on one rank as well"
    worst = f"{result['worst_parameter']}, off by {_error(result['max_relative_error'])}"
    return f"not equal ({result['tolerance']:.0e} allowed): {where}{_sent(difference)}\n{fault}\nworst gradient: {worst}"


def _where(difference: dict[str, Any]) -> str:
    phase, operator = difference["phase"], difference["operator"]
    layer, _, end = operator.rpartition(".")
    if phase == "figure":
        return f"all gradients agree, the {operator}"
    if phase == "parameter":
        return f"what goes between operators agrees, the gradient of {operator}"
    if phase == "forward":
        return f"what arrives at {layer}" if end == "input" else f"the output of {_operator(operator)}"
    if end == "output":
        return f"forward agrees, then the gradient that comes back to {layer}"
    return f"forward agrees, then the gradient that {_operator(operator)} hands back"


def _operator(path: str) -> str:
    """What it is, and its path: the product layers.0.attention.out."""
    if "attention.core" in path:
        return f"the attention {path}"
    if path.startswith("layers.") and path.count(".") == 1:
        return f"the residual sum of {path}"
    return f"the {_KINDS[path.rpartition('.')[2]]} {path}"


def _sent(difference: dict[str, Any]) -> str:
    """Of what an operator did itself: what travels between stages was sent by another rank, long before."""
    if difference["phase"] not in ("forward", "backward") or difference["operator"].endswith((".input", ".output")):
        return ""
    since = "in it" if difference["phase"] == "forward" else "since the operator before"
    return f"\nsent {since}: {', '.join(difference['sent']) or 'nothing'}"


def _worst(parameters: dict[str, float | None]) -> list[str]:
    def key(name: str) -> float:
        error = parameters[name]
        return float("inf") if error is None else error

    return sorted(parameters, key=key, reverse=True)[:WORST]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6f}"


def _error(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"


_HEADER = """\
# Parity, mode by mode

    meshwright verify --matrix                  # make parity adds --count 180

Each layout runs one step on local processes, on a shrunk model, and is held against one process: the gradient of every parameter, the
loss and the gradient norm, at 1e-9 relative in fp64 and 1e-5 in fp32. Numbers are worst relative errors over all steps that they
sum up; `(n)`: over how many. Layouts are distinct; a few run on several models.

Batches: `packed`, two documents a sequence, padded to very different lengths; `whole`, one document, no padding; `lopsided`, a few
tokens of one sequence count, and most ranks have none; `hot`, a router that sends all tokens to the same few experts and none to the
others. In the tables of pairs, `zero2x` is hybrid sharding, `pp:uneven` stages that hold unequal numbers of layers, `ac:N` recompute of
some layers, `order` another rank order than the default; a number in brackets says why no layout of up to 8 ranks combines the two.
[verify.md](verify.md) says what is run and what is not equal by design.
"""


def matrix_markdown(matrices: list[dict[str, Any]]) -> str:
    """`matrices`: as `verify --matrix --json` prints them. A summary; then, of those in the first precision, worst errors by model and
    batch and by pairs of modes, with a note for each empty cell."""
    lines = [
        _HEADER,
        "| models | precision | layouts | steps | not equal | gradients | loss | gradient norm |",
        "|---" * 8 + "|",
    ]
    lines += [_summary(one) for one in matrices]
    for one in matrices:
        lines += [f"- not equal in {one['precision']}: `{case}`" for case in one["failed"]]
    for one in matrices:
        if one["precision"] == matrices[0]["precision"]:
            lines += ["", f"## {one['title']}, {one['precision']}", "", *_fixtures(one), "", *_pairs(one)]
    return "\n".join(lines) + "\n"


def _summary(matrix: dict[str, Any]) -> str:
    errors = (_error(matrix["worst"][name]) for name in ("gradient", "loss", "grad_norm"))
    counts = (matrix["layouts"], matrix["cases"], len(matrix["failed"]))
    return _row(matrix["title"], matrix["precision"], *map(str, counts), *errors)


def _fixtures(matrix: dict[str, Any]) -> list[str]:
    cells = {(cell["model"], cell["batch"]): f"{_error(cell['error'])} ({cell['cases']})" for cell in matrix["fixtures"]}
    batches = list(dict.fromkeys(batch for _, batch in cells))
    models = dict.fromkeys(model for model, _ in cells)
    rows = [_row(model, *(cells.get((model, batch), "") for batch in batches)) for model in models]
    return [_row("model", *batches), "|---" * (len(batches) + 1) + "|", *rows]


def _pairs(matrix: dict[str, Any]) -> list[str]:
    """The lower half: the table is symmetric."""
    cells = {
        tuple(cell["modes"]): "infinite" if cell["error"] is None else f"{cell['error']:.0e}" for cell in matrix["cells"]
    }
    reasons = {tuple(cell["modes"]): cell["reason"] for cell in matrix["empty"]}
    notes = {reason: f"[{number}]" for number, reason in enumerate(dict.fromkeys(reasons.values()), start=1)}
    cells |= {pair: notes[reason] for pair, reason in reasons.items()}
    modes = matrix["modes"]
    rows = [_row(f"**{mode}**", *(cells.get((mode, other), "") for other in modes)) for mode in modes]
    legend = [f"- {note} {reason}" for reason, note in notes.items()]
    return [_row("", *modes), "|---" * (len(modes) + 1) + "|", *rows, "", *legend]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
