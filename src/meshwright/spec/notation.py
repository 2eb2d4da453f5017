"""The one-line form of a Layout: `parse(format(x)) == x`.

    dp20:zero1 tp8:sp pp4x2:interleaved cp2:ring ep8 mb1 ac:selective bf16

Tokens stand in any order; an axis that is left out has degree 1.
"""

from __future__ import annotations

import re
from typing import Any

from meshwright.spec.errors import UserError
from meshwright.spec.layout import (
    DENSE_AXES,
    OFFLOAD_PLACES,
    OFFLOADS,
    PRECISIONS,
    RECOMPUTE_PARTS,
    RECOMPUTES,
    SCHEDULES,
    Layout,
)

GRAMMAR = """\
dpN[:zeroK[xG]]   data parallel; ZeRO stage K, sharded within groups of G
tpN[:sp|:async]   tensor parallel; with sequence parallel; and its communication in pieces under the products
ppN[xV][:NAME]    pipeline stages; V chunks a stage; schedule: {schedules}
cpN[:ring|:ulysses|:ringAxulyssesB]   context parallel
epN[:async], etpN  expert parallel; with its all-to-all under the other pass of a pair; tensor parallel inside an expert
mbN               sequences in a micro-batch
ac:MODE[:N]       activation recompute: {recomputes}, or a list such as core+norms of {parts}; of N layers a chunk
{precisions}      precision that is computed in
params:P, grads:P precision of kept parameters, of summed gradients
offload:WHAT[@WHERE]  what is kept away until it is needed: {offloads}; WHERE: {places}
stages:A-B-...    layers of each pipeline chunk, in the order of the model
order:A-B-C-D     rank order, innermost first (default {order})""".format(
    schedules=", ".join(SCHEDULES),
    recomputes=", ".join(RECOMPUTES),
    parts=", ".join(RECOMPUTE_PARTS),
    offloads=", ".join(OFFLOADS[1:]),
    places=", ".join(OFFLOAD_PLACES),
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
        tokens.append(f"tp{layout.tp}" + (":async" if layout.async_tp else ":sp" if layout.sp else ""))
    if layout.pp > 1:
        chunks = f"x{layout.chunks}" if layout.chunks > 1 else ""
        tokens.append(f"pp{layout.pp}{chunks}:{layout.schedule}")
    if layout.cp > 1:
        tokens.append(f"cp{layout.cp}:{_cp_mode(layout)}")
    if layout.ep > 1:
        tokens.append(f"ep{layout.ep}" + (":async" if layout.async_ep else ""))
    if layout.etp > 1:
        tokens.append(f"etp{layout.etp}")
    tokens.append(f"mb{layout.micro_batch}")
    if layout.recompute != "none":
        mode = layout.recompute if layout.recompute_parts == ("core",) else "+".join(layout.recompute_parts)
        tokens.append(f"ac:{mode}" + (f":{layout.recompute_layers}" if layout.recompute_layers else ""))
    tokens.append(layout.precision)
    tokens += [f"params:{layout.parameter_dtype}"] if layout.parameter_dtype else []
    tokens += [f"grads:{layout.gradient_dtype}"] if layout.gradient_dtype else []
    if layout.offload != "none":
        tokens.append(f"offload:{layout.offload}" + (f"@{layout.offload_to}" if layout.offload_to != "cpu" else ""))
    if layout.stage_layers is not None:
        tokens.append("stages:" + "-".join(map(str, layout.stage_layers)))
    if layout.order != DENSE_AXES:
        tokens.append("order:" + "-".join(layout.order))
    return " ".join(tokens)


def _read_token(token: str) -> dict[str, Any]:
    if token in PRECISIONS:
        return {"precision": token}
    name, _, value = token.partition(":")
    if name == "ac":
        return _read_recompute(token, value)
    if name in ("params", "grads"):
        if value not in PRECISIONS:
            raise _not_understood(token)
        return {"parameter_dtype" if name == "params" else "gradient_dtype": value}
    if name == "offload":
        what, _, where = value.partition("@")
        return {"offload": what} | ({"offload_to": where} if where else {})
    if name == "stages":
        if not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})*", value):
            raise _not_understood(token)
        return {"stage_layers": tuple(int(n) for n in value.split("-"))}
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


def _read_recompute(token: str, value: str) -> dict[str, Any]:
    mode, _, layers = value.partition(":")
    fields: dict[str, Any] = {"recompute": mode}
    if mode not in RECOMPUTES and set(mode.split("+")) <= set(RECOMPUTE_PARTS):
        fields = {"recompute": "selective", "recompute_parts": tuple(mode.split("+"))}
    if layers and not re.fullmatch(r"[0-9]{1,6}", layers):
        raise _not_understood(token)
    return fields | ({"recompute_layers": int(layers)} if layers else {})


def _read_mode(token: str, axis: str, mode: str) -> dict[str, Any]:
    if axis == "dp" and (zero := _ZERO.fullmatch(mode)):
        return {"zero": int(zero[1])} | ({"zero_shard": int(zero[2])} if zero[2] else {})
    if axis == "tp" and mode == "sp":
        return {"sp": True}
    if axis == "tp" and mode == "async":
        return {"sp": True, "async_tp": True}
    if axis == "ep" and mode == "async":
        return {"async_ep": True}
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
