"""What ranks do in the tests of pairs. Imported by the rank processes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from workers import build, local_batch

from meshwright.parallel.collectives import Group
from meshwright.parallel.mesh import build_mesh
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

PATCHED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
LONGEST = 0.003
"""Seconds before a collective, at most."""


@dataclass
class Calls:
    """Which thread issued what, in order, and how often one did while the other was in a collective."""

    order: list[tuple[bool, str]] = field(default_factory=list)
    at_once: int = 0
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Outcome:
    figures: list[float]
    gradients: dict[str, torch.Tensor]
    at_once: int
    order: tuple[tuple[bool, str], ...]


def delayed(model: Model, workload: Workload, layout: Layout) -> Outcome:
    """Step 1, in which each rank waits a random while before each collective."""
    engine, calls = build(model, workload, layout), Calls()
    with _delays(calls, random.Random(dist.get_rank())):
        figures = engine.forward_backward(local_batch(model, workload, engine)).tolist()
    gradients = {shard.name: gradient for shard, gradient in engine.state.whole_gradients()}
    return Outcome(figures, gradients, calls.at_once, tuple(calls.order))


@contextmanager
def _delays(calls: Calls, source: random.Random) -> Iterator[None]:
    originals = {name: getattr(Group, name) for name in PATCHED}
    for name, original in originals.items():
        setattr(Group, name, _delayed(name, original, calls, source))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Group, name, original)


def _delayed(name: str, original: Callable[..., Any], calls: Calls, source: random.Random) -> Callable[..., Any]:
    def collective(group: Group, *args: Any, **kwargs: Any) -> Any:
        with calls.lock:
            calls.at_once += calls.under_way > 0
            calls.under_way += 1
            wait = source.uniform(0, LONGEST)
        time.sleep(wait)
        with calls.lock:
            calls.order.append((threading.current_thread() is threading.main_thread(), name))
        out = original(group, *args, **kwargs)
        with calls.lock:
            calls.under_way -= 1
        return out

    return collective


def communicators(model: Model, layout: Layout) -> list[str]:
    """Of what joins the ranks that share experts: each chunk's, and that of the reduction of gradients."""
    mesh = build_mesh(layout, model, torch.device("cpu"))
    groups = [mesh.lane(0)["ep"], mesh.lane(1)["ep"], mesh["dp"]]
    return [group.handle.group_name for group in groups if group.handle is not None]
