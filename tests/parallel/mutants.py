"""The engine with one collective taken out or done twice, or one scaling factor wrong: what the checks must notice.

The call sites of collectives are found in the source of `meshwright.parallel`, so a new one is a new mutant. In the ranks,
`Group`'s methods are wrapped: at the chosen site they do nothing (and leave what one rank alone would compute), or everything
twice. Scaling factors are changes to the text of a module, which a rank executes anew and afterwards restores.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import workers

import meshwright.parallel
from meshwright.models.routing import Balance
from meshwright.parallel.balance import load_metrics
from meshwright.parallel.collectives import Group
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange")
WAYS = ("removed", "doubled")
ROOM = Path(str(meshwright.parallel.__file__)).parent

ENGINE = (
    "collectives",
    "vocab",
    "linear",
    "async_tp",
    "tensor",
    "mesh",
    "offload",
    "slots",
    "bucket",
    "data",
    "units",
    "context",
    "balance",
    "expert",
    "pipeline",
    "apply",
)
"""Modules of `meshwright.parallel`, each after those that it imports."""


@dataclass(frozen=True)
class Site:
    """A call of a collective: `operation` on lines `first` to `last` of `module`, inside `function`."""

    module: str
    function: str
    operation: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.operation}"


@dataclass(frozen=True)
class CollectiveMutant:
    site: Site
    way: str

    def __str__(self) -> str:
        return f"{self.site} {self.way}"


@dataclass(frozen=True)
class ScaleMutant:
    """`old` becomes `new` in the text of `module`."""

    what: str
    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.what


Mutant = CollectiveMutant | ScaleMutant

SCALES = (
    ScaleMutant("pipeline: loss divided by the token count twice", "pipeline", "* self.scale", "* self.scale * self.scale"),
    ScaleMutant(
        "apply: loss not divided by the token count",
        "apply",
        "(loss_scale / counted)",
        "(loss_scale / counted.clamp(max=1))",
    ),
    ScaleMutant("apply: every tp rank counts the loss", "apply", 'loss * (self.mesh["tp"].index == 0)', "loss"),
    ScaleMutant("data: every replica of the state counts the norm", "data", "bucket.replicate.index == 0 and ", ""),
    ScaleMutant(
        "data: every replica of a parameter counts the norm", "data", " and self.mesh.owns(bucket.plan.replicas)", ""
    ),
    ScaleMutant("apply: the norm keeps the loss scale", "apply", " / loss_scale**2", " / loss_scale"),
    ScaleMutant("apply: the loss keeps the loss scale", "apply", ".double() / loss_scale", ".double()"),
)


def sites() -> tuple[Site, ...]:
    """Every call of a collective of `Group` in the engine."""
    out = []
    for path in sorted(ROOM.glob("*.py")):
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            inner = {
                id(n)
                for f in ast.walk(function)
                if isinstance(f, ast.FunctionDef) and f is not function
                for n in ast.walk(f)
            }
            for node in ast.walk(function):
                if id(node) in inner or not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr in OPERATIONS and ast.unparse(node.func.value) != "dist":
                    where = _class_of(tree, function) + function.name
                    out.append(Site(path.stem, where, node.func.attr, node.lineno, node.end_lineno or node.lineno))
    return tuple(out)


def _class_of(tree: ast.Module, function: ast.FunctionDef) -> str:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and function in node.body:
            return f"{node.name}."
    return ""


# Twice the maximum over stages is the maximum, and what statistics send is not booked, so nothing can tell.
SAME = {("balance", "load_metrics", "all_reduce", "op=dist.ReduceOp.MAX")}


def is_same(mutant: CollectiveMutant) -> bool:
    site = mutant.site
    text = "".join((ROOM / f"{site.module}.py").read_text().splitlines()[site.first - 1 : site.last])
    return mutant.way == "doubled" and any(
        (site.module, site.function, site.operation) == s[:3] and s[3] in text for s in SAME
    )


COLLECTIVES = [CollectiveMutant(site, way) for site in sites() for way in WAYS]
MUTANTS: tuple[Mutant, ...] = (*(m for m in COLLECTIVES if not is_same(m)), *SCALES)


@dataclass
class Outcome:
    """What one rank computed and sent."""

    stage: int
    seat: Any
    figures: list[float]
    gradients: workers.Gradients
    losses: list[float]
    loads: dict[str, float]
    sent: list[tuple[str, str, int, int, int]]
    hit: set[Site]


def run(mutant: Mutant | None, model: Model, workload: Workload, layout: Layout, balanced: bool) -> Outcome:
    """Figures, gradients and traffic of step 1, and the losses of three steps, with the mutant in place."""
    hit: set[Site] = set()
    loss_scale, balance, loads = 4.0, None, {}
    if balanced:
        assert model.experts is not None
        balance = Balance(aux_loss=0.1, z_loss=0.01, bias_rate=0.05 if model.experts.selection_bias else 0.0)
    with installed(mutant, hit):
        engine = workers.build(model, workload, layout, balance)
        engine.mesh.ledger.clear()
        figures = engine.forward_backward(workers.local_batch(model, workload, engine), loss_scale).tolist()
        gradients = [(shard, gradient / loss_scale) for shard, gradient in engine.state.whole_gradients()]
        engine.state.publish()
        sent = [(e.axis, e.op, e.group_size, count, nbytes) for e, count, nbytes in engine.mesh.ledger.rows()]
        if balanced:
            engine.balance_experts()
            loads = load_metrics(*engine.loads, engine.mesh["pp"])
        losses = workers.losses(model, workload, layout, 3, balance)
    return Outcome(engine.mesh.stage, engine.mesh.seat, figures, gradients, losses, loads, sent, hit)


@contextmanager
def installed(mutant: Mutant | None, hit: set[Site]) -> Iterator[None]:
    if isinstance(mutant, ScaleMutant):
        try:
            _execute(mutant)
            yield
        finally:
            _execute(None)
        return
    # A scale mutant has left other classes behind: wrap those that the engine uses now.
    group = importlib.import_module("meshwright.parallel.collectives").Group
    originals = {name: getattr(group, name) for name in OPERATIONS}
    by_line = {(s.module, s.operation, line): s for s in sites() for line in range(s.first, s.last + 1)}
    try:
        for name, original in originals.items():
            setattr(group, name, _wrapped(name, original, mutant, by_line, hit))
        yield
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def _wrapped(
    name: str,
    original: Callable[..., Any],
    mutant: CollectiveMutant | None,
    by_line: dict[tuple[str, str, int], Site],
    hit: set[Site],
) -> Callable[..., Any]:
    def collective(group: Group, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        site = by_line.get((Path(frame.f_code.co_filename).stem, name, frame.f_lineno))
        if site is not None and group.size > 1:
            hit.add(site)
        if mutant is None or site != mutant.site or group.size == 1:
            return original(group, *args, **kwargs)
        if mutant.way == "removed":
            return _INSTEAD[name](group, *args)
        first = original(group, *args, **kwargs)
        for handle in first if isinstance(first, list) else [first]:
            if handle is not None:
                handle.wait()
        return original(group, *args, **kwargs)

    return collective


class Done:
    def wait(self) -> None:
        pass


def _no_all_reduce(group: Group, tensor: torch.Tensor) -> Done:
    return Done()


def _no_all_gather(group: Group, out: torch.Tensor, tensor: torch.Tensor) -> Done:
    out.copy_(torch.cat([tensor] * group.size))
    return Done()


def _no_reduce_scatter(group: Group, out: torch.Tensor, tensor: torch.Tensor) -> Done:
    out.copy_(tensor.chunk(group.size)[group.index])
    return Done()


def _no_all_to_all(group: Group, out: torch.Tensor, tensor: torch.Tensor, out_rows: Any, rows: Any) -> None:
    """Only what this rank sends itself arrives."""
    for i, (to, kept) in enumerate(zip(out.split(list(out_rows)), tensor.split(list(rows)), strict=True)):
        to.copy_(kept) if i == group.index else to.zero_()


def _no_exchange(group: Group, sends: Any, receives: Any) -> list[Done]:
    for tensor, _ in receives:
        tensor.zero_()
    return [Done() for _ in (*sends, *receives)]


_INSTEAD: dict[str, Callable[..., Any]] = {
    "all_reduce": _no_all_reduce,
    "all_gather": _no_all_gather,
    "reduce_scatter": _no_reduce_scatter,
    "all_to_all": _no_all_to_all,
    "exchange": _no_exchange,
}


def _execute(mutant: ScaleMutant | None) -> None:
    for name in (*(f"meshwright.parallel.{name}" for name in ENGINE), "meshwright.train.optimizer", "workers"):
        module = importlib.import_module(name)
        source = Path(str(module.__file__)).read_text()
        if mutant is not None and name.endswith(f"parallel.{mutant.module}"):
            assert source.count(mutant.old) == 1, (
                f"{mutant}: {mutant.old!r} stands {source.count(mutant.old)} times in {name}"
            )
            source = source.replace(mutant.old, mutant.new)
        exec(compile(source, str(module.__file__), "exec"), module.__dict__)
