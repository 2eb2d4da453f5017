"""A dry run as Chakra execution traces, one file a rank, which ASTRA-sim and other simulators run on networks of their own.

Format: MLCommons Chakra, schema/protobuf/et_def.proto: metadata and then nodes, each behind its length. Attributes, names of files and
the JSON of communicator groups are as ASTRA-sim 2 reads them (workload/Workload.cc). Nodes are matrix products, attention and
communication; elementwise work is in none of them. The bytes of an all-gather are those that each rank brings, of all else the whole
input, which is how ASTRA-sim counts.

What a node waits for is what the engine waits for: computations follow one another, a collective that is waited for at once holds up
what comes after it, any other only what comes after the wait (data_deps). Calls of one group stay in order (ctrl_deps).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.export.protobuf import chosen, delimited, message, number, numbers, text
from meshwright.spec.errors import UserError
from meshwright.spec.grid import Grid, Members, group_members
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES
from meshwright.trace.result import Attended, Event, Product, Received, Sent, StageTrace, Trace, Waited

SCHEMA = "0.0.4"
COMPUTE, SEND, RECEIVE, COLLECTIVE = 4, 5, 6, 7
"""Of NodeType."""
COLLECTIVES = {"all_reduce": 0, "all_gather": 2, "all_to_all": 6, "reduce_scatter": 7}
"""Of CollectiveCommType."""
Seconds = Callable[[Event, int], float]
"""Of an event that a rank saw."""
PREFIX, GROUPS = "step", "comm_groups.json"
"""Files: step.0.et, step.1.et, ..., and the groups that they name."""


def write_chakra(
    trace: Trace, model: Model, out: Path, ranks: Sequence[int] | None = None, seconds: Seconds | None = None
) -> None:
    """Write the files into the directory `out`, which is made if need be.

    `ranks`: by default all of the stages that were traced. All ranks of a stage do what its traced rank did, with groups of their own:
    they differ at most in the vocabulary's uneven cut. `seconds`: of an event, for the nodes' durations; without it they have none.
    Raises UserError when `out` cannot be written, or has no room.
    """
    grid = Grid(trace.layout)
    stages = {stage.stage: stage for stage in trace.stages}
    wanted = [rank for rank in range(grid.world) if grid.coordinates(rank)["pp"] in stages] if ranks is None else ranks
    size = STATE_BYTES[trace.layout.precision].parameter
    nodes = {at: list(stage_nodes(stage, size, seconds)) for at, stage in stages.items()}
    head = delimited(text(1, SCHEMA) + _text("model", trace.model, 2) + _text("layout", str(trace.layout), 2))
    groups = _Groups(grid, model)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_room(out, sum(sum(len(node.fixed) for node in nodes[grid.coordinates(rank)["pp"]]) for rank in wanted))
        for rank in wanted:
            with (out / f"{PREFIX}.{rank}.et").open("wb") as file:
                file.write(head)
                at = grid.coordinates(rank)["pp"]
                file.writelines(_of_rank(nodes[at], stages[at].rank, rank, groups))
        named = {str(each): list(members) for members, each in groups.numbers.items()}
        (out / GROUPS).write_text(json.dumps(named))
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from None


def _check_room(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out).free
    if nbytes > free:
        raise UserError(
            f"{out}: the files of all ranks take {nbytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: try one --stage or one --rank"
        )


@dataclass(frozen=True, slots=True)
class Node:
    """A node without what depends on the rank. `group`: of communication; `peer`: of a send or receive, index in it on the traced rank."""

    kind: int
    fixed: bytes
    group: str = ""
    peer: int = -1


def stage_nodes(stage: StageTrace, size: int, seconds: Seconds | None) -> Iterator[Node]:
    """In the order of the step, numbered from 1. `size`: bytes of an element."""
    order = _Order()
    for section in stage.sections:
        for event in (event for part in section.parts for event in part.events):
            if isinstance(event, Waited):
                order.wait(event.number)
            elif isinstance(event, Product | Attended | Sent | Received):
                kind, name, attributes = _described(event, size)
                head = number(1, order.last + 1) + text(2, f"{section.name}: {name}") + number(3, kind)
                took = 0 if seconds is None else number(7, max(1, round(seconds(event, stage.rank) * 1e6)))
                deps = order.add(event)
                fixed = head + deps + (took or b"") + attributes
                if isinstance(event, Sent | Received):
                    yield Node(kind, fixed, event.group, event.peer)
                else:
                    yield Node(kind, fixed)


class _Order:
    """Who waits for whom."""

    def __init__(self) -> None:
        self.last = 0
        self._frontier: list[int] = []
        """Nodes that must be over before the next begins."""
        self._posted: dict[int, int] = {}
        self._of_group: dict[str, int] = {}

    def add(self, event: Product | Attended | Sent | Received) -> bytes:
        self.last += 1
        before = self._frontier
        if isinstance(event, Received) or (isinstance(event, Sent) and event.number):
            self._posted[event.number] = self.last
        else:
            self._frontier = [self.last]
        after: list[int] = []
        if isinstance(event, Sent):
            last = self._of_group.get(event.group)
            after = [] if last is None or last in before else [last]
            self._of_group[event.group] = self.last
        return numbers(4, after) + numbers(5, before)

    def wait(self, call: int) -> None:
        """A call that this rank did not make belongs to the rank whose work it replays, and is over."""
        node = self._posted.pop(call, None)
        if node is not None and node not in self._frontier:
            self._frontier = [*self._frontier, node]


def _described(event: Product | Attended | Sent | Received, size: int) -> tuple[int, str, bytes]:
    """Kind, name and attributes of a node."""
    where = f"{event.path} " if event.path else ""
    gpu = _choice("is_cpu_op", 27, 0)
    if isinstance(event, Received):
        return RECEIVE, f"{where}receive", gpu + _integer("comm_size", event.nbytes)
    if isinstance(event, Sent) and event.op == "send":
        return SEND, f"{where}send", gpu + _integer("comm_size", event.nbytes)
    if isinstance(event, Sent):
        brought = event.nbytes // event.group_size if event.op == "all_gather" else event.nbytes
        sizes = _integer("comm_type", COLLECTIVES[event.op]) + _integer("comm_size", brought)
        return COLLECTIVE, f"{where}{event.axis} {event.op}", gpu + sizes
    if isinstance(event, Product):
        m, n, k = event.m, event.n, event.k
        work = _integer("num_ops", int(event.flops)) + _integer(
            "tensor_size", size * event.groups * (m * k + k * n + m * n)
        )
        return COMPUTE, f"{where}{event.op} {m} x {k} by {k} x {n}", gpu + work
    work = _integer("num_ops", int(event.flops)) + _integer("tensor_size", size * event.elements)
    return COMPUTE, f"{where}attention", gpu + work


class _Groups:
    """Communicator groups by their ranks, numbered from 1: ASTRA-sim takes group 0 for the whole world."""

    def __init__(self, grid: Grid, model: Model):
        self.grid, self.model = grid, model
        self.numbers: dict[tuple[int, ...], int] = {}
        self._members: dict[str, Members] = {}

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self._members:
            self._members[name] = group_members(self.grid, self.model, name)
        return self._members[name](rank)

    def number(self, members: tuple[int, ...]) -> int:
        return self.numbers.setdefault(members, len(self.numbers) + 1)


def _of_rank(nodes: Sequence[Node], traced: int, rank: int, groups: _Groups) -> Iterator[bytes]:
    """Nodes as they stand in the file of `rank`, from those of the rank that was `traced`: what that sent to a neighbour goes to the same
    neighbour. Messages between two ranks are numbered by the order in which they are posted, which is the same at both ends
    (`schedule/check.py`)."""
    messages: Counter[tuple[int, int]] = Counter()
    known: dict[str, tuple[int, ...]] = {}
    further: dict[str, int] = {}
    for node in nodes:
        own = b""
        if node.group and node.group not in known:
            known[node.group] = groups.of(node.group, rank)
            further[node.group] = known[node.group].index(rank) - groups.of(node.group, traced).index(traced)
        if node.kind == COLLECTIVE:
            own = _text("pg_name", str(groups.number(known[node.group])), 10)
        elif node.kind != COMPUTE:
            members = known[node.group]
            peer = members[(node.peer + further[node.group]) % len(members)]
            ends = (rank, peer) if node.kind == SEND else (peer, rank)
            own = _integer("comm_src", ends[0]) + _integer("comm_dst", ends[1]) + _integer("comm_tag", messages[ends])
            messages[ends] += 1
        yield delimited(node.fixed + own)


# --- attributes: field 10 of a node, field 2 of the metadata


def _integer(name: str, value: int) -> bytes:
    """int64_val."""
    return _choice(name, 9, value)


def _choice(name: str, field: int, value: int) -> bytes:
    return message(10, text(1, name) + chosen(field, value))


def _text(name: str, value: str, at: int) -> bytes:
    """string_val."""
    return message(at, text(1, name) + message(29, value.encode()))
