"""Reads execution traces by the schema, and runs them as ASTRA-sim does: knows nothing of the writer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMP, SEND, RECV, COLL = 4, 5, 6, 7
VALUES = {9: "int64", 27: "bool", 29: "string"}


@dataclass
class Node:
    id: int
    name: str
    type: int
    ctrl_deps: list[int]
    data_deps: list[int]
    duration_micros: int
    attr: dict[str, Any]

    @property
    def deps(self) -> set[int]:
        return {*self.ctrl_deps, *self.data_deps}


def read(path: Path) -> tuple[dict[int, Any], list[Node]]:
    """(metadata, nodes)."""
    data, at, messages = path.read_bytes(), 0, []
    while at < len(data):
        size, at = varint(data, at)
        assert at + size <= len(data), "the last message is cut off"
        messages.append(data[at : at + size])
        at += size
    return fields(messages[0]), [node(each) for each in messages[1:]]


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 128:
            return value, at


def fields(data: bytes) -> dict[int, list[Any]]:
    out: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            assert key & 7 == 2, f"wire type {key & 7}"
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        out.setdefault(key >> 3, []).append(value)
    return out


def node(data: bytes) -> Node:
    found = fields(data)
    assert set(found) <= {1, 2, 3, 4, 5, 7, 10}
    return Node(
        id=found[1][0],
        name=found[2][0].decode(),
        type=found[3][0],
        ctrl_deps=unpacked(found.get(4, [])),
        data_deps=unpacked(found.get(5, [])),
        duration_micros=found.get(7, [0])[0],
        attr=dict(attribute(each) for each in found[10]),
    )


def unpacked(packed: list[bytes]) -> list[int]:
    out = []
    for data in packed:
        at = 0
        while at < len(data):
            value, at = varint(data, at)
            out.append(value)
    return out


def attribute(data: bytes) -> tuple[str, Any]:
    found = fields(data)
    name = found.pop(1)[0].decode()
    ((number, (value,)),) = found.items()
    return name, value.decode() if VALUES[number] == "string" else bool(value) if VALUES[number] == "bool" else value


def run(ranks: dict[int, list[Node]], groups: dict[str, list[int]]) -> None:
    """Every rank has one computation, one send or collective, and any number of receives at a time, and takes the free node of the lowest
    number. Fails when the ranks wait for one another, or when those of a collective do not agree on what it is."""
    waiting = {rank: {each.id: each for each in nodes} for rank, nodes in ranks.items()}
    done: dict[int, set[int]] = {rank: set() for rank in ranks}
    busy: dict[int, Node | None] = dict.fromkeys(ranks)
    sent: dict[tuple[int, int, int], int] = {}
    joined: Counter[tuple[int, str]] = Counter()
    arrived: dict[tuple[str, int], list[tuple[int, Node]]] = {}
    moved = True
    while moved:
        moved = False
        for rank, nodes in waiting.items():
            for each in sorted(nodes.values(), key=lambda n: n.id):
                if not each.deps <= done[rank] or (each.type in (SEND, COLL) and busy[rank]):
                    continue
                a = each.attr
                if each.type == RECV:
                    assert a["comm_dst"] == rank
                    if (key := (a["comm_src"], rank, a["comm_tag"])) not in sent:
                        continue
                    assert sent[key] == a["comm_size"]
                elif each.type == SEND:
                    assert a["comm_src"] == rank
                    sent[rank, a["comm_dst"], a["comm_tag"]] = a["comm_size"]
                elif each.type == COLL:
                    name = a["pg_name"]
                    assert rank in groups[name]
                    busy[rank] = each
                    call = name, joined[rank, name]
                    joined[rank, name] += 1
                    arrived.setdefault(call, []).append((rank, each))
                    del nodes[each.id]
                    moved = True
                    if len(arrived[call]) == len(groups[name]):
                        assert len({(n.attr["comm_type"], n.attr["comm_size"]) for _, n in arrived[call]}) == 1
                        for member, its in arrived.pop(call):
                            busy[member] = None
                            done[member].add(its.id)
                    break
                del nodes[each.id]
                done[rank].add(each.id)
                moved = True
                break
    assert not any(waiting.values()), {rank: min(nodes) for rank, nodes in waiting.items() if nodes}
    assert not arrived
