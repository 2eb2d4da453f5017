"""What the catalogue holds, and what a layout means rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.report.units import count, gib
from meshwright.spec.cluster import Cluster
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.parameters import count_parameters

MANY_RANKS = 64


def models_table(models: Sequence[Model]) -> RenderableType:
    table = Table(title="models", title_justify="left")
    for name in (
        "name",
        "family",
        "parameters",
        "active",
        "layers",
        "hidden",
        "heads",
        "kv heads",
        "vocabulary",
    ):
        table.add_column(name, justify="left" if name in ("name", "family") else "right")
    for m in models:
        counts = count_parameters(m)
        figures = (m.layers, m.hidden, m.heads, m.kv_heads, m.vocab)
        table.add_row(m.name, m.family, count(counts.total), count(counts.active), *map(str, figures))
    return table


def clusters_table(clusters: Sequence[Cluster]) -> RenderableType:
    table = Table(title="clusters", title_justify="left")
    for name in ("name", "accelerator", "memory", "bf16 peak", "a node", "domain", "NICs a node", "source"):
        table.add_column(name)
    for c in clusters:
        peak = c.accelerator.peak_flops.get("bf16")
        nics = f"{c.node.nics} x {c.node.nic_bandwidth * 8 / 1e9:.0f} Gbit/s" if c.node.nics else "-"
        shown = f"{peak / 1e12:,.4g} TFLOP/s" if peak else "-"
        table.add_row(
            c.name,
            c.accelerator.name,
            gib(c.accelerator.memory_bytes),
            shown,
            str(c.node.accelerators),
            str(c.fabric.domain),
            nics,
            c.source,
        )
    return table


def layout_report(layout: Layout) -> RenderableType:
    """The two world equations, what each axis means, and every rank's coordinates and groups."""
    text = Text(
        f"{layout}\n\n"
        f"world = pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x tp {layout.tp} = {layout.world} ranks\n"
        f"world = pp {layout.pp} x edp {layout.edp} x ep {layout.ep} x etp {layout.etp} = {layout.world} ranks (experts)\n"
        f"rank order, innermost first: {', '.join(layout.order)}\n"
    )
    axes = Table(title="axes", title_justify="left")
    for name in ("axis", "degree", "stride", "groups", "what it splits, and what it must synchronise"):
        axes.add_column(name)
    for axis, meaning in _meanings(layout).items():
        degree = layout.degree(axis)
        if degree > 1:
            axes.add_row(axis, str(degree), str(layout.stride(axis)), str(layout.world // degree), meaning)
    return Group(text, axes, Text(), _ranks(layout))


def layout_dict(layout: Layout) -> dict[str, object]:
    grid = Grid(layout)
    active = [axis for axis in layout.order if layout.degree(axis) > 1]
    return {
        "layout": str(layout),
        "world": layout.world,
        "order": list(layout.order),
        "ranks": [{"rank": r, **grid.coordinates(r)} for r in range(layout.world)],
        "groups": {axis: [list(g) for g in grid.groups(axis)] for axis in active},
    }


def _meanings(layout: Layout) -> dict[str, str]:
    sp = (
        "; norm regions hold 1/tp of the tokens, which travel piece by piece under the products"
        if layout.async_tp
        else "; norm regions hold 1/tp of the tokens, sums become reduce-scatter + all-gather"
        if layout.sp
        else "; 2 all-reduces a layer each way"
    )
    zero = {
        0: "all-reduce of gradients",
        1: "reduce-scatter of gradients, all-gather of parameters; optimizer state cut by dp",
    }
    return {
        "tp": "heads, MLP width and vocabulary" + sp,
        "cp": "the sequence; keys and values travel",
        "dp": "the batch; " + zero.get(layout.zero, f"ZeRO stage {layout.zero}"),
        "pp": f"the layers, in stages run by {layout.schedule}; activations forward, gradients back",
    }


def _ranks(layout: Layout) -> RenderableType:
    grid = Grid(layout)
    active = [axis for axis in layout.order if layout.degree(axis) > 1]
    table = Table(title="ranks", title_justify="left")
    for name in ("rank", *(f"{axis} index" for axis in active), *(f"{axis} group" for axis in active)):
        table.add_column(name, justify="right")
    for rank in range(min(layout.world, MANY_RANKS)):
        here = grid.coordinates(rank)
        table.add_row(
            str(rank), *(str(here[axis]) for axis in active), *(_short(grid.group(axis, rank)) for axis in active)
        )
    if layout.world > MANY_RANKS:
        return Group(table, Text(f"... and {layout.world - MANY_RANKS} more ranks (all with --json)"))
    return table


def _short(ranks: tuple[int, ...]) -> str:
    return ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"
