"""What the engine was seen to do beside what `cost/program.py` says that it does, line by line. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshwright.cost.memory import stage_memories, state_bytes
from meshwright.cost.ops import Attention, Gemm, Op, Under
from meshwright.cost.program import Pieces, Place, Program, rank_program
from meshwright.cost.traffic import collectives, step_traffic
from meshwright.schedule.actions import Kind
from meshwright.schedule.orders import layout_schedule
from meshwright.schedule.stages import stage_chunks
from meshwright.spec.grid import Grid
from meshwright.spec.layout import Layout
from meshwright.spec.legality import micro_batches
from meshwright.spec.model import Model
from meshwright.spec.precision import STATE_BYTES
from meshwright.spec.workload import Workload
from meshwright.trace.result import Attended, Product, Section, Sent, StageTrace, Work

PASSES = {"forward": (Kind.FORWARD,), "backward": (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)}
SCALARS = ((), (1,))
"""Shapes of losses, and of what stands for a parameter that is not there: left out of what a forward keeps."""
STATE = ("parameters", "gradients", "optimizer")
_SETS = ("attention.qkv", "mlp.gate_up", "moe.shared.gate_up", "head", "moe.experts")
"""Modules that compute several of the program's products."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was compared. `traced` and `estimated` are counts or bytes, as `unit` says."""

    what: str
    name: str
    unit: str
    traced: float
    estimated: float

    @property
    def agrees(self) -> bool:
        return self.traced == self.estimated


@dataclass(frozen=True, slots=True)
class Check:
    """The lines of one stage. `peak_bytes` and `estimated_peak_bytes` are compared by their ratio: the estimate says what is live at the
    fullest moment in a few terms, not operator by operator."""

    stage: int
    lines: tuple[Line, ...]
    peak_bytes: int
    estimated_peak_bytes: int

    @property
    def differences(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.agrees)

    @property
    def peak_error(self) -> float:
        return self.estimated_peak_bytes / self.peak_bytes - 1


def check_stage(traced: StageTrace, model: Model, layout: Layout, workload: Workload) -> Check:
    """Every line of one traced stage."""
    m, program = micro_batches(layout, workload), _program(traced.rank, model, layout, workload)
    lines = [
        *_traffic(traced, program, m),
        *_state(traced, program, layout),
        *_saved(traced, program, model, layout, workload),
        *(line for name, kinds in PASSES.items() for line in _passes(traced, program, model, layout, name, kinds)),
    ]
    return Check(traced.stage, tuple(lines), traced.peak_bytes, estimated_peak(traced.rank, model, layout, workload))


def estimated_peak(rank: int, model: Model, layout: Layout, workload: Workload) -> int:
    """Bytes that the rank holds at once, without what the runtime takes."""
    schedule, stage = layout_schedule(layout, micro_batches(layout, workload)), Grid(layout).coordinates(rank)["pp"]
    (held,) = stage_memories(_program(rank, model, layout, workload), layout, schedule, [stage], overhead=0)
    return held.total_bytes


def _program(rank: int, model: Model, layout: Layout, workload: Workload) -> Program:
    grid = Grid(layout)
    here = grid.coordinates(rank) | grid.expert_coordinates(rank)
    return rank_program(model, layout, workload, Place(here["pp"], here["tp"], here["ep"], here["etp"]))


def _traffic(traced: StageTrace, program: Program, m: int) -> Iterator[Line]:
    seen = {tuple(row[:3]): row[3:] for row in traced.sent}
    said = {(s.axis, s.op, s.group_size): (s.count, s.bytes) for s in step_traffic(program, m)}
    for key in sorted({*seen, *said}):
        name = f"{key[0]} {key[1]} of {key[2]}"
        for unit, a, b in zip(("calls", "bytes"), seen.get(key, (0, 0)), said.get(key, (0, 0)), strict=True):
            yield Line("step's collectives", name, unit, a, b)


def _state(traced: StageTrace, program: Program, layout: Layout) -> Iterator[Line]:
    said = state_bytes(program, layout)
    first = traced.sections[0].work
    for name in STATE:
        seen = sum(s.nbytes * sign for s, sign in first.net.items() if s.category == name)
        yield Line("state", name, "bytes", seen, said[name])


def _saved(traced: StageTrace, program: Program, model: Model, layout: Layout, workload: Workload) -> Iterator[Line]:
    """What a forward leaves for its backward, its input included."""
    tokens = layout.micro_batch * workload.seq // layout.cp
    hidden = tokens * model.hidden * STATE_BYTES[layout.precision].parameter // (layout.tp if layout.sp else 1)
    for number, chunk in enumerate(stage_chunks(model.layers, layout)[traced.stage]):
        work = _typical(traced, Kind.FORWARD, number)
        kept = sum(
            s.nbytes for s, sign in work.net.items() if sign > 0 and s.category == "activations" and s.shape not in SCALARS
        )
        given = tokens * 8 if chunk.first else hidden
        said = sum(piece.saved_bytes * repeat for piece, repeat in program.chunks[number])
        yield Line("saved by a forward", f"chunk {number}", "bytes", kept + given, said)


def _passes(
    traced: StageTrace, program: Program, model: Model, layout: Layout, name: str, kinds: tuple[Kind, ...]
) -> Iterator[Line]:
    """Products, attention and collectives of one micro-batch on each chunk."""
    for number, pieces in enumerate(program.chunks):
        whole = (
            _has(traced, Kind.BACKWARD, number) and name == "backward"
        )  # some schedules split the backward of some micro-batches
        works = [_typical(traced, kind, number) for kind in ((Kind.BACKWARD,) if whole else kinds)]
        seen, said = _seen(works, layout), _said(pieces, name, model, layout)
        for key in sorted({*seen, *said}):
            yield Line(f"{name} of chunk {number}", key, "calls", seen[key], said[key])


def _seen(works: Iterable[Work], layout: Layout) -> Counter[str]:
    out: Counter[str] = Counter()
    for work in works:
        for event in work.events:
            if isinstance(event, Product) and not (event.op.startswith("b") and 1 in (event.m, event.n, event.k)):
                place = _place(event.path)
                out[_product(place, event.m, event.n, event.k)] += _weight(place, event)
            elif isinstance(event, Attended) and layout.cp_ring == 1:
                out[f"attention of {event.heads} heads over {event.keys} keys"] += 1
            elif isinstance(event, Sent) and event.axis not in ("dp", "edp", "pp"):
                out[f"{event.axis} {event.op} of {event.nbytes} bytes"] += 1
    return out


def _said(pieces: Pieces, name: str, model: Model, layout: Layout) -> Counter[str]:
    out: Counter[str] = Counter()
    for piece, repeat in pieces:
        ops = piece.forward if name == "forward" else piece.backward
        for op in _flat(ops):
            if isinstance(op, Gemm):
                place = _place(op.name.split(" ")[0])
                out[_product(place, op.m, op.n, op.k)] += repeat * _weight(place, op)
            elif isinstance(op, Attention) and layout.cp_ring == 1:
                out[f"attention of {op.heads // layout.cp_ulysses} heads over {op.length + model.sinks} keys"] += repeat
        for sent in collectives(ops):
            out[f"{sent.axis} {sent.op} of {sent.bytes} bytes"] += repeat
    return out


def _flat(ops: Iterable[Op]) -> Iterator[Op]:
    for op in ops:
        if isinstance(op, Under):
            yield from op.work
        else:
            yield op


def _place(path: str) -> str:
    """A module's path, or a product's name, without the layer's number and without the parts of a set."""
    words = path.split(".")
    if words[0] == "layers":
        words = words[2:]
    name = ".".join(words)
    return next((one for one in _SETS if name == one or name.startswith(f"{one}.")), name)


def _product(place: str, m: int, n: int, k: int) -> str:
    """Experts' products are compared by their FLOPs: how many rows each gets is the router's choice."""
    return f"{place}: FLOPs" if place == "moe.experts" else f"{place}: {m} x {k} by {k} x {n}"


def _weight(place: str, product: Product | Gemm) -> int:
    if place == "moe.experts":
        return 2 * product.m * product.n * product.k
    return product.groups if isinstance(product, Product) else 1


def _has(traced: StageTrace, kind: Kind, chunk: int) -> bool:
    return any(_is(section, kind, chunk) for section in traced.sections)


def _typical(traced: StageTrace, kind: Kind, chunk: int) -> Work:
    """The last: the first makes what stays, such as tables of angles."""
    return [section.work for section in traced.sections if _is(section, kind, chunk)][-1]


def _is(section: Section, kind: Kind, chunk: int) -> bool:
    return section.action is not None and section.action.kind is kind and section.action.chunk == chunk
