"""Protocol Buffers on the wire, as far as the exports need them: messages of integers, strings and messages, written behind their length.

Format: "Encoding" of the Protocol Buffers guide. A field is a key, (number << 3) | wire type, and its value: a varint (type 0), or a
length and so many bytes (type 2). Fields with default values are left out, as proto3 has it.
"""

from __future__ import annotations

from collections.abc import Iterable


def varint(value: int) -> bytes:
    """Seven bits a byte, low ones first. `value` is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """An integer, an enumeration or a truth value; none of them negative."""
    return varint(field << 3) + varint(value) if value else b""


def chosen(field: int, value: int) -> bytes:
    """`number` where the field is one of a choice: written even if it is zero, or nothing would be chosen."""
    return varint(field << 3) + varint(value)


def text(field: int, value: str) -> bytes:
    return message(field, value.encode()) if value else b""


def numbers(field: int, values: Iterable[int]) -> bytes:
    """A repeated integer, packed."""
    packed = b"".join(map(varint, values))
    return message(field, packed) if packed else b""


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + delimited(content)


def delimited(content: bytes) -> bytes:
    """Behind its length: how messages follow one another in a file."""
    return varint(len(content)) + content
