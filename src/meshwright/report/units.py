"""Figures made readable for a person. GiB = 2^30 bytes, GB = 1e9 bytes; the unit is always written."""

from __future__ import annotations


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def size(nbytes: float) -> str:
    """Decimal units, as links are rated."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def count(value: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.1%}"
