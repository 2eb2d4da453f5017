"""Layouts near a given one: degrees moved from one axis to others on the same ranks, and modes that make room or speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from meshwright.planner.space import divisors
from meshwright.spec.errors import UserError
from meshwright.spec.layout import PAIRING, Layout


def reshaped(layout: Layout, **changes: object) -> Layout | None:
    """`layout` with other degrees and modes; what goes with a degree that is gone goes too. None where an equation breaks."""
    fields = {name: getattr(layout, name) for name in layout.__slots__} | changes
    if fields["tp"] == 1:
        fields |= {"sp": False, "async_tp": False}
    elif layout.tp == 1 and "sp" not in changes:
        fields["sp"] = True
    if fields["pp"] == 1:
        fields |= {"chunks": 1, "schedule": "1f1b"}
    if fields["ep"] == 1 or fields["schedule"] not in PAIRING or fields["zero"] == 3:
        fields["async_ep"] = False
    if (fields["pp"], fields["chunks"]) != (layout.pp, layout.chunks) and "stage_layers" not in changes:
        fields["stage_layers"] = None
    if fields["cp"] != layout.cp and "cp_ulysses" not in changes:
        fields["cp_ulysses"] = fields["cp"] if layout.cp > 1 and layout.cp_ring == 1 else 1
    if (
        fields["cp"] > fields["cp_ulysses"]
        and fields["recompute"] == "selective"
        and fields["recompute_parts"] == ("core",)
    ):
        fields["recompute"] = "none"  # a ring keeps no scores
    if fields["recompute"] == "none":
        fields |= {"recompute_parts": ("core",), "recompute_layers": None}
    if fields["dp"] * fields["cp"] == 1:
        fields["zero"] = 0
    shard = fields["zero_shard"]
    if shard is not None and (not fields["zero"] or fields["dp"] % shard or shard in (1, fields["dp"])):
        fields["zero_shard"] = None
    try:
        return Layout(**fields)
    except UserError:
        return None


def moved(layout: Layout, axis: str, to: int, onto: Iterable[str] = ("dp", "pp", "cp", "tp")) -> Iterator[Layout]:
    """The degree of `axis` cut to `to`, a divisor of it, and the factor that this frees shared out over the axes `onto` in every
    way."""
    axes = [name for name in onto if name != axis]
    for parts in _products(layout.degree(axis) // to, len(axes)):
        degrees = {name: layout.degree(name) * part for name, part in zip(axes, parts, strict=True)}
        found = reshaped(layout, **{axis: to}, **degrees)
        if found is not None:
            yield found


def cuts(layout: Layout, axis: str, most: int, onto: Iterable[str] = ("dp", "pp", "cp", "tp")) -> Iterator[Layout]:
    """`moved` to every divisor of the degree that is at most `most`."""
    for to in divisors(layout.degree(axis)):
        if to <= most and to < layout.degree(axis):
            yield from moved(layout, axis, to, tuple(onto))


def eased(layouts: Iterable[Layout]) -> Iterator[Layout]:
    """Each layout, and each with its micro-batch halved, its optimizer state cut, all or nothing recomputed."""
    for layout in layouts:
        halves = dict.fromkeys((layout.micro_batch, max(1, layout.micro_batch // 2), 1))
        zeros = dict.fromkeys((layout.zero, 1))
        recomputes = dict.fromkeys((layout.recompute, "none", "full"))
        for mb, zero, recompute in product(halves, zeros, recomputes):
            changes: dict[str, object] = {"micro_batch": mb, "zero": zero, "recompute": recompute}
            if recompute != layout.recompute:
                changes |= {"recompute_parts": ("core",), "recompute_layers": None}
            found = reshaped(layout, **changes)
            if found is not None:
                yield found


def order_has_price(layout: Layout, domain: int) -> bool:
    """Whether the estimator prices the rank order of `layout` as it is. It knows one distance for a group and one link for a send,
    and experts on neighbouring ranks of a stage, so not where ranks that reduce gradients together (dp and cp) have an axis between
    them, where some neighbours share a domain and others do not, or where a pipeline lies inside the ranks that share experts."""
    split = [axis for axis in layout.order if layout.degree(axis) > 1]
    spaced = not {"dp", "cp"} <= set(split) or abs(split.index("dp") - split.index("cp")) == 1
    alike = all(layout.stride(x) * layout.degree(x) <= domain or layout.stride(x) % domain == 0 for x in split if x != "dp")
    return spaced and alike and (layout.ep * layout.etp == 1 or "pp" not in split[:-1])


def _products(factor: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `factor` as an ordered product of `parts` factors."""
    if parts == 1:
        yield (factor,)
        return
    for first in divisors(factor):
        for rest in _products(factor // first, parts - 1):
            yield first, *rest
