"""The one-line form of a Layout: `parse(format(x)) == x`.

    dp20:zero1 tp8:sp pp4x2:interleaved cp2:ring ep8 mb1 ac:selective bf16

Tokens stand in any order; an axis that is left out has degree 1.
"""

from __future__ import annotations

import re
from typing import Any

from meshwright.spec.errors import UserError
from meshwright.spec.layout import DENSE_AXES, PRECISIONS, RECOMPUTES, SCHEDULES, Layout

GRAMMAR = """\
dpN[:zeroK[xG]]   data parallel; ZeRO stage K, sharded within groups of G
tpN[:sp]          tensor parallel; with sequence parallel
ppN[xV][:NAME]    pipeline stages; V chunks a stage; schedule: {schedules}
cpN[:ring|:ulysses|:ringAxulyssesB]   context parallel
epN, etpN         expert parallel; tensor parallel inside an expert
mbN               sequences in a micro-batch
ac:MODE           activation recompute: {recomputes}
{precisions}      precision
order:A-B-C-D     rank order, innermost first (default {order})""".format(
    schedules=", ".join(SCHEDULES),
    recomputes=", ".join(RECOMPUTES),
    precisions=" | ".join(PRECISIONS),
    order="-".join(DENSE_AXES),
)
EXAMPLE = "dp20:zero1 tp8:sp pp4 mb1"

_AXIS = re.compile(r"(dp|tp|pp|cp|etp|ep|mb)([0-9]{1,9})(?:x([0-9]{1,9}))?(?::(.+))?")
_ZERO = re.compile(r"zero([0-3])(?:x([0-9]{1,9}))?")
_NESTED = re.compile(r"ring([0-9]{1,9})xulysses([0-9]{1,9})")


def parse_layout(text: str) -> Layout:
    """Read the one-line form. Raises UserError naming the token that is not understood."""
    fields: dict[str, Any] = {}
    for token in text.split():
        for name, value in _read_token(token).items():
            if name in fields:
                raise UserError(f"layout {text!r} gives {name} twice (again in {token!r})")
            fields[name] = value
    if not fields:
        raise UserError(f"the layout is empty: try {EXAMPLE!r}, or 'dp1' for one process")
    cp_mode = fields.pop("cp_mode", None)
    if cp_mode is not None:
        fields["cp_ulysses"] = _ulysses_degree(fields.get("cp", 1), cp_mode)
    return Layout(**fields)


def format_layout(layout: Layout) -> str:
    """The canonical one-line form: axes of degree 1 and default modes are left out."""
    tokens = []
    if layout.dp > 1 or layout.zero:
        hybrid = f"x{layout.zero_shard}" if layout.zero_shard else ""
        tokens.append(f"dp{layout.dp}" + (f":zero{layout.zero}{hybrid}" if layout.zero else ""))
    if layout.tp > 1:
        tokens.append(f"tp{layout.tp}" + (":sp" if layout.sp else ""))
    if layout.pp > 1:
        chunks = f"x{layout.chunks}" if layout.chunks > 1 else ""
        tokens.append(f"pp{layout.pp}{chunks}:{layout.schedule}")
    if layout.cp > 1:
        tokens.append(f"cp{layout.cp}:{_cp_mode(layout)}")
    tokens += [f"{axis}{layout.degree(axis)}" for axis in ("ep", "etp") if layout.degree(axis) > 1]
    tokens.append(f"mb{layout.micro_batch}")
    if layout.recompute != "none":
        tokens.append(f"ac:{layout.recompute}")
    tokens.append(layout.precision)
    if layout.order != DENSE_AXES:
        tokens.append("order:" + "-".join(layout.order))
    return " ".join(tokens)


def _read_token(token: str) -> dict[str, Any]:
    if token in PRECISIONS:
        return {"precision": token}
    if token.startswith("ac:"):
        return {"recompute": token[3:]}
    if token.startswith("order:"):
        return {"order": tuple(token[6:].split("-"))}
    match = _AXIS.fullmatch(token)
    if not match:
        raise _not_understood(token)
    axis, degree, chunks, mode = match.groups()
    if chunks and axis != "pp":
        raise _not_understood(token)
    fields: dict[str, Any] = {"micro_batch" if axis == "mb" else axis: int(degree)}
    if chunks:
        fields["chunks"] = int(chunks)
    if mode is not None:
        fields.update(_read_mode(token, axis, mode))
    return fields


def _read_mode(token: str, axis: str, mode: str) -> dict[str, Any]:
    if axis == "dp" and (zero := _ZERO.fullmatch(mode)):
        return {"zero": int(zero[1])} | ({"zero_shard": int(zero[2])} if zero[2] else {})
    if axis == "tp" and mode == "sp":
        return {"sp": True}
    if axis == "pp":
        return {"schedule": mode}
    if axis == "cp" and (mode in ("ring", "ulysses") or _NESTED.fullmatch(mode)):
        return {"cp_mode": mode}
    raise _not_understood(token)


def _ulysses_degree(cp: int, mode: str) -> int:
    nested = _NESTED.fullmatch(mode)
    if not nested:
        return 1 if mode == "ring" else cp
    ring, ulysses = int(nested[1]), int(nested[2])
    if ring * ulysses != cp:
        raise UserError(f"cp{cp}:{mode}: ring {ring} x ulysses {ulysses} = {ring * ulysses}, not {cp}")
    return ulysses


def _cp_mode(layout: Layout) -> str:
    if layout.cp_ulysses == 1:
        return "ring"
    if layout.cp_ring == 1:
        return "ulysses"
    return f"ring{layout.cp_ring}xulysses{layout.cp_ulysses}"


def _not_understood(token: str) -> UserError:
    legal = "; ".join(line.split("  ")[0] for line in GRAMMAR.splitlines())
    return UserError(f"layout token {token!r} is not understood: write tokens such as {EXAMPLE!r}; legal: {legal}")
