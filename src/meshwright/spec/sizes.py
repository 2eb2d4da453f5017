"""Sizes as a person types them: "60GiB" is 60 x 2^30 bytes, "80GB" is 80e9."""

from __future__ import annotations

import re

from meshwright.spec.errors import UserError

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "60GiB", "1.5 GB" or 64000000000. Raises UserError for anything else, and for less than a byte."""
    match = _SIZE.fullmatch(str(text))
    unit = match[2] if match else None
    if match is None or unit not in _UNITS:
        raise UserError(
            f"size {text!r} is not understood: write a number and a unit, such as 60GiB; legal units: {', '.join(_UNITS)[2:]}"
        )
    size = int(float(match[1]) * _UNITS[unit])
    if size < 1:
        raise UserError(f"size {text!r} must be at least 1 byte")
    return size
