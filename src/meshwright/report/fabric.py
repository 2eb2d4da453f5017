"""A layout on the links of its cluster as terminal tables."""

from __future__ import annotations

from math import floor

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.fabric.view import ALL_AXES, FabricView
from meshwright.report.units import percent, seconds, size

LINK_NAMES = {"pcie": "PCIe", "nic": "NIC", "leaf": "leaf - spine", "core": "spine - core"}


def fabric_report(v: FabricView, links: int = 0) -> RenderableType:
    """All tables of `v`, and its `links` busiest links."""
    parts = [_headline(v), _uses(v)]
    parts += [_spreads(v)] if v.spreads else []
    parts += [_orders(v)] if v.orders else []
    parts += [_what_ifs(v)] if v.what_ifs else []
    parts += [_links(v, links)] if links else []
    spaced = [each for part in parts for each in (part, Text())]
    return Group(*spaced[:-1])


def _headline(v: FabricView) -> RenderableType:
    t = v.topology
    title = f"{v.model} on {v.layout.world} x {t.cluster.name}: {v.layout}"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("fabric", _fabric(v))
    estimated = seconds(v.estimated_step_s)
    table.add_row("step", f"{seconds(v.step_s)}, {_more(v.step_s, v.estimated_step_s)} over the {estimated} of `estimate`")
    if v.slowed:
        table.add_row("bytes take", ", ".join(f"{factor:.3g} times as long: {name}" for name, factor in v.slowed.items()))
    for what, use in (("hottest link", v.hottest()), ("between nodes", v.hottest(between_nodes=True))):
        if use is not None:
            table.add_row(what, f"{use.busiest}: {size(use.busiest_bytes)} a step, busy {percent(use.busy)} of it")
    for each in v.tolerated:
        tier = LINK_NAMES[each.tier]
        table.add_row("oversubscription", f"{tier}: {_tolerated(each.oversubscription, each.crosses, v.slower)}")
    return table


def _fabric(v: FabricView) -> str:
    t = v.topology
    nodes = f"{t.nodes:,} nodes of {t.cluster.node.accelerators}"
    if not t.has_network:
        return f"{nodes}, no network"
    tiers = f"{t.leaves:,} leaves of {t.ports_down} NICs and {t.uplinks} uplinks, {t.spines:,} spines"
    tiers += f" in {t.pods} pods, {t.cores:,} cores" if t.pods > 1 else ""
    kind, spread = t.cluster.fabric.kind, v.spreading
    return f"{nodes} in {t.units:,} units of {t.unit_nodes}, {kind}: {tiers}; flows: {spread}"


def _tolerated(oversubscription: float | None, crosses: bool, slower: float) -> str:
    if not crosses:
        return "nothing crosses it"
    if oversubscription is None:
        return f"a single uplink costs less than {slower:.0%}"
    return f"up to {floor(oversubscription * 10) / 10:g}:1 costs less than {slower:.0%}"


def _more(step: float, base: float) -> str:
    return f"{step / base - 1:+.2%}"


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...], last: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for name in (*left, *right, *last):
        table.add_column(name, justify="right" if name in right else "left")
    return table


def _uses(v: FabricView) -> RenderableType:
    figures = ("busiest link", "mean", "all links", "GB/s", "busy")
    table = _table("bytes of a step, in the busier direction", ("link", "axis"), figures, ("the busiest",))
    for at, use in enumerate(v.uses):
        link = {"scale-up": v.topology.cluster.accelerator.scale_up.name}.get(use.link_class, use.link_class)
        first = at == 0 or v.uses[at - 1].link_class != use.link_class
        table.add_row(
            LINK_NAMES.get(link, link) if first else "",
            use.axis,
            size(use.busiest_bytes),
            size(use.mean_bytes),
            size(use.total_bytes),
            f"{use.rate / 1e9:.2f}",
            percent(use.busy),
            use.busiest if use.axis == ALL_AXES else "",
            end_section=use.axis == ALL_AXES,
        )
    return table


def _spreads(v: FabricView) -> RenderableType:
    one = v.spreads[0]
    title = f"up to {one.flows} flows of a leaf on {one.uplinks} uplinks"
    table = _table(title, ("spreading",), ("slowest flow's share", "step", "slower"))
    for each in v.spreads:
        table.add_row(each.name, percent(each.share), seconds(each.step_s), _more(each.step_s, v.estimated_step_s))
    return table


def _orders(v: FabricView) -> RenderableType:
    figures = ("step", "slower", "over spines", "over the core", "busiest between nodes")
    table = _table("rank orders, innermost first", ("order", ""), figures)
    best = v.orders[0].step_s
    for each in v.orders:
        table.add_row(
            "-".join(axis for axis in each.layout.order if each.layout.degree(axis) > 1),
            "this layout" if each.is_given else "",
            seconds(each.step_s),
            _more(each.step_s, best),
            size(each.leaf_bytes),
            size(each.core_bytes),
            percent(each.busiest),
        )
    return table


def _what_ifs(v: FabricView) -> RenderableType:
    table = _table("what if", ("", "what"), ("step", "slower"))
    for each in v.what_ifs:
        if each.step_s is None:
            table.add_row(each.name, each.what, "the job stops", "")
        else:
            table.add_row(each.name, each.what, seconds(each.step_s), _more(each.step_s, v.step_s))
    return table


def _links(v: FabricView, count: int) -> RenderableType:
    table = _table(f"the {count} busiest links", ("link",), ("rate", "busy"), ("bytes of a step",))
    for link in v.links(count):
        by_axis = ", ".join(f"{axis} {size(nbytes)}" for axis, nbytes in link.bytes.items())
        table.add_row(link.name, f"{link.capacity / 1e9:.0f} GB/s", percent(link.busy), by_axis)
    return table
