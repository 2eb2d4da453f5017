"""Context parallel without torch: which tokens of a sequence a cp rank holds, and which of its queries see which keys.

    cp = ring x ulysses            cp index = ring index x ulysses + ulysses index     (ulysses innermost: it talks most)

A ring cuts the sequence into 2 x ring pieces and ring index i holds pieces i and 2 x ring - 1 - i, so that under causal attention
every rank has the same work at every step of the ring ("zig-zag"; Llama 3, arXiv 2407.21783, section 3.3.2, has the same cut for
its all-gather). The ulysses ranks of a ring index hold consecutive equal parts of its two pieces. With no ring, a rank holds one
consecutive part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model

Ranges = tuple[range, ...]
"""Positions in a sequence, ascending; no two ranges touch."""


def context_slices(seq: int, ring: int, ulysses: int, index: int) -> Ranges:
    """The positions of a sequence of `seq` tokens that cp index `index` holds, in the order in which it holds them.

    `seq` must be a multiple of `sequence_unit(ring, ulysses)`.
    """
    assert seq % sequence_unit(ring, ulysses) == 0, "check_context has passed"
    ring_index, part = divmod(index, ulysses)
    piece, share = seq // (2 * ring), seq // (ring * ulysses)
    low, high = ring_index * piece, (2 * ring - 1 - ring_index) * piece
    pieces = [range(low, low + piece), range(high, high + piece)] if ring > 1 else [range(seq)]
    return _cut(pieces, part * share, (part + 1) * share)


def sequence_unit(ring: int, ulysses: int) -> int:
    """What a sequence must be a multiple of: whole pieces, and equal parts of a pair of them."""
    return lcm(2 * ring, ring * ulysses) if ring > 1 else ulysses


def kv_copies(kv_heads: int, ulysses: int) -> int:
    """How many ranks of a ulysses group need each of the `kv_heads` key-value heads that they all have before the all-to-all:
    1 where every rank gets heads of its own."""
    return max(1, ulysses // kv_heads)


def check_context(layout: Layout, model: Model, seq: int) -> None:
    """Raise UserError when `seq` tokens or the heads of a tp rank cannot be cut as `layout` says. tp itself must have passed."""
    ring, ulysses = layout.cp_ring, layout.cp_ulysses
    unit = sequence_unit(ring, ulysses)
    if seq % unit:
        below = seq // unit * unit
        why = f"2 x ring {ring} pieces for ulysses {ulysses}" if ring > 1 else f"ulysses {ulysses} parts"
        raise UserError(
            f"cp{layout.cp} cuts seq {seq} into {why}: seq must be a multiple of {unit}: "
            f"try seq {f'{below} or ' if below else ''}{below + unit}"
        )
    heads, kv_heads = model.heads // layout.tp, max(1, model.kv_heads // layout.tp)
    legal = [u for u in range(1, layout.cp + 1) if layout.cp % u == 0 and _equal_shares(heads, kv_heads, u)]
    if ulysses not in legal:
        where = f" on a tp rank (tp {layout.tp})" if layout.tp > 1 else ""
        raise UserError(
            f"ulysses {ulysses} gives every rank an equal share of the attention heads, but {model.name} has {heads} query and "
            f"{kv_heads} key-value heads{where}: legal ulysses in cp{layout.cp}: {', '.join(map(str, legal))}"
        )


def _equal_shares(heads: int, kv_heads: int, ulysses: int) -> bool:
    """Key-value heads are shared out where there are enough of them, and copied where there are fewer than ranks."""
    return heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)


def _cut(ranges: Sequence[range], start: int, stop: int) -> Ranges:
    """Positions number `start` to `stop` of those in `ranges`, merged where they touch."""
    out: list[range] = []
    for one in ranges:
        part = one[max(0, start) : max(0, stop)]
        start, stop = start - len(one), stop - len(one)
        if part and out and out[-1].stop == part.start:
            part = range(out.pop().start, part.stop)
        if part:
            out.append(part)
    return tuple(out)


# --- which queries see which keys -------------------------------------------------------------------------------------

MASKED_ROWS = 512
"""Most queries that share a mask: bounds its size, and the scores computed in vain above the diagonal."""
LEAST_MASKED_ROWS = 128
"""Fewer queries do not keep a kernel busy."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `rows` of a block of queries and `columns` of a block of keys, by number in their blocks.

    `causal`: as many queries as keys at the same positions, of which the lower triangle is seen. `masked`: seen in part. Neither:
    every query sees every key.
    """

    rows: range
    columns: range
    causal: bool = False
    masked: bool = False


def tiles(queries: Ranges, keys: Ranges, window: int | None = None, *, documents: bool = False) -> list[Tile]:
    """Causal attention of a block of queries over a block of keys, as rectangles that a kernel computes whole.

    What no query sees is in no tile, and each query is in at most one. `window`: keys that a query sees, itself included.
    `documents`: what is seen by position may yet be in another document.
    """
    if not documents and queries == keys and (window is None or window >= keys[-1].stop - keys[0].start):
        count = sum(map(len, queries))
        return [Tile(range(count), range(count), causal=True)]
    out: list[Tile] = []
    for first_row, rows in _enumerate(queries):
        for tile in _tiles_of_range(first_row, rows, keys, window, documents):
            joins = out and out[-1].rows.stop == tile.rows.start and out[-1].columns == tile.columns
            if joins and not (tile.masked or out[-1].masked):
                tile = Tile(range(out.pop().rows.start, tile.rows.stop), tile.columns)
            out.append(tile)
    return out


def _tiles_of_range(first_row: int, rows: range, keys: Ranges, window: int | None, documents: bool) -> Iterator[Tile]:
    """One tile if no mask is needed, else one for every few queries, so that each computes little more than it shows."""
    whole = _tile(first_row, rows, keys, window, documents)
    if whole is None:
        return
    if not whole.masked:
        yield whole
        return
    step = MASKED_ROWS if window is None else min(MASKED_ROWS, max(LEAST_MASKED_ROWS, window))
    for start in range(0, len(rows), step):
        tile = _tile(first_row + start, rows[start : start + step], keys, window, documents)
        if tile is not None:
            yield tile


def _tile(first_row: int, rows: range, keys: Ranges, window: int | None, documents: bool) -> Tile | None:
    """The keys that any of the neighbouring queries `rows` sees, and whether all see all."""
    after = -1 if window is None else rows.start - window
    columns = range(_count_below(keys, after + 1), _count_below(keys, rows.stop))
    if not columns:
        return None
    oldest, newest = _position(keys, columns[0]), _position(keys, columns[-1])
    full = newest <= rows.start and (window is None or rows[-1] - oldest < window) and not documents
    return Tile(range(first_row, first_row + len(rows)), columns, masked=not full)


def _enumerate(ranges: Ranges) -> Iterator[tuple[int, range]]:
    """Each range with the number of positions before it."""
    before = 0
    for one in ranges:
        yield before, one
        before += len(one)


def _count_below(ranges: Ranges, position: int) -> int:
    return sum(min(max(position - one.start, 0), len(one)) for one in ranges)


def _position(ranges: Ranges, number: int) -> int:
    for before, one in _enumerate(ranges):
        if number < before + len(one):
            return one[number - before]
    raise AssertionError("a block has as many positions as its ranges")
