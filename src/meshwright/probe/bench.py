"""`meshwright bench`: one measurement after the other on a pool of ranks, and the Cluster that they make."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch

from meshwright.parallel.ranks import RankPool
from meshwright.probe.collectives import group_sizes, measure_collectives, operations
from meshwright.probe.compute import DTYPES, measure_attention, measure_matmul, measure_memory
from meshwright.probe.machine import Machine, foreign_seconds, this_machine
from meshwright.probe.window import rounded
from meshwright.spec.catalogue import accelerator_of_device, catalogue_accelerators, load_accelerator, load_cluster
from meshwright.spec.cluster import Accelerator, AttentionPoint, Cluster, CollectivePoint, MatmulPoint, Measured, ScaleUp
from meshwright.spec.errors import UserError, choices

Progress = Callable[[str, float], None]
_KIB, _MIB = 2**10, 2**20
_BUSY = 0.1
"""Above this share of the cores, what other processes do is part of the result, and the source says so."""
_PLANNED = 0.7
"""Of the time: the rest is for starting ranks, and for calls that are longer than their share."""
_LEAST = 0.02
"""Seconds of a point of weight 1 where the time has run out: with fewer, small ones would measure the clock."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: matmul (m tokens, n, k), lengths of attention with `heads` heads, bytes of arrays and messages."""

    matmul: tuple[tuple[int, int, int], ...]
    attention: tuple[int, ...]
    heads: int
    array_bytes: int
    messages: tuple[int, ...]


CPU_SIZES = Sizes(
    matmul=((128, 128, 128), (256, 256, 256), (512, 512, 512), (1024, 1408, 512), (2048, 2048, 2048)),
    attention=(128, 256, 512, 1024, 2048),
    heads=8,
    array_bytes=4 * _MIB,
    messages=(*(_KIB * 4**i for i in range(8)), 32 * _MIB),
)
GPU_SIZES = Sizes(
    matmul=(*((s, s, s) for s in (256, 512, 1024, 2048, 4096)), (4096, 14336, 4096), (8192, 8192, 8192)),
    attention=(512, 1024, 2048, 4096, 8192),
    heads=32,
    array_bytes=64 * _MIB,
    messages=tuple(_KIB * 4**i for i in range(10)),
)


@dataclass(frozen=True)
class _Task:
    """`function(*args, seconds a point)` on `world` ranks; it measures `points` points, each worth `weight` of the time."""

    label: str
    world: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    points: int
    weight: int

    @property
    def share(self) -> int:
        return self.points * self.weight


@dataclass(frozen=True)
class _Findings:
    matmul: tuple[MatmulPoint, ...]
    attention: tuple[AttentionPoint, ...]
    memory: dict[int, float]
    """Bytes/s of one rank by how many are active."""
    collectives: tuple[CollectivePoint, ...]


def measure_cluster(
    ranks: int,
    *,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    seconds: float = 60.0,
    base: Cluster | None,
    progress: Progress | None = None,
    sizes: Sizes | None = None,
) -> Cluster:
    """Measure this machine with `ranks` ranks (GPUs, or processes that share the cores) for about `seconds`.

    `base`: the cluster that this machine is a node of; only its `measured` is replaced. None: this machine alone is the
    cluster, and where the catalogue does not know its processor, the peaks are the largest rates measured.
    `progress` is told what is measured next and the fraction done. `sizes`: other sizes than those for a CPU or a GPU.
    Raises UserError for precisions and numbers of ranks that cannot be measured here.
    """
    machine = this_machine()
    _check(machine, ranks, precisions, base)
    tasks = list(_tasks(ranks, precisions, sizes or (GPU_SIZES if machine.devices else CPU_SIZES)))
    start, foreign = time.monotonic(), foreign_seconds()
    with _pool(machine) as pool:
        results = _run(tasks, pool, max(1, machine.cores // ranks), seconds, progress or (lambda *_: None))
        busy = (foreign_seconds() - foreign) / (time.monotonic() - start) / (os.cpu_count() or 1)
    found, source = _findings(tasks, results), _source(machine, ranks, busy)
    measured = Measured(
        source=source,
        matmul=found.matmul,
        attention=found.attention,
        memory_bandwidth=found.memory[ranks],
        collectives=found.collectives,
    )
    changes = {"measured": measured, "source": source}
    return (base or _own_cluster(machine, ranks, measured, found.memory[1])).model_copy(update=changes)


def _check(machine: Machine, ranks: int, precisions: tuple[str, ...], base: Cluster | None) -> None:
    machine.check_ranks(ranks)
    for precision in precisions:
        if precision not in DTYPES:
            raise choices(precision, DTYPES, "precision")
    if base is None:
        return
    wanted, here = base.accelerator.name, accelerator_of_device(machine.processor) if machine.devices else "cpu"
    if wanted in catalogue_accelerators() and wanted != here:
        raise UserError(f"{base.name} is made of {wanted}, but this machine computes on {machine.processor}")
    if ranks > base.node.accelerators:
        has = base.node.accelerators
        raise UserError(f"ranks {ranks}: a node of {base.name} has {has} accelerators, and one node is measured")


def _source(machine: Machine, ranks: int, busy: float) -> str:
    """Where the figures come from, and whether they deserve trust: `busy` is the share of the cores that others had."""
    version = torch.__version__.split("+")[0]
    where = f"{machine.processor}, {machine.cores} cores, torch {version}, {machine.backend}, {_count(ranks)}"
    doubt = f"; other processes took {busy:.0%} of the cores meanwhile" if busy > _BUSY else ""
    return f"meshwright bench, {date.today().isoformat()}, {where}{doubt}"


def _count(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def _tasks(ranks: int, precisions: tuple[str, ...], sizes: Sizes) -> Iterator[_Task]:
    """The slow ones, many ranks at work on large shapes, come first, so that later ones can make up for them."""
    for active in sorted({1, ranks}, reverse=True):
        on = f"on {_count(active)}"
        for precision in precisions:
            yield _Task(f"{precision} matmul {on}", active, measure_matmul, (precision, sizes.matmul), len(sizes.matmul), 2)
            attention = (precision, sizes.attention, sizes.heads)
            yield _Task(f"{precision} attention {on}", active, measure_attention, attention, len(sizes.attention), 4)
        yield _Task(f"memory {on}", active, measure_memory, (sizes.array_bytes,), 1, 4)
    for size in group_sizes(ranks)[::-1]:
        points = len(operations(size)) * len(sizes.messages)
        yield _Task(f"collectives among {size} ranks", ranks, measure_collectives, (size, sizes.messages), points, 1)


@contextmanager
def _pool(machine: Machine) -> Iterator[RankPool]:
    pool = RankPool(machine.backend)
    try:
        yield pool
    finally:
        pool.close()


def _run(tasks: list[_Task], pool: RankPool, threads: int, seconds: float, progress: Progress) -> list[Any]:
    """Each task's result on rank 0. What is left of the time is shared out anew before every task."""
    deadline, results = time.monotonic() + _PLANNED * seconds, []
    remaining = total = sum(task.share for task in tasks)
    for task in tasks:
        progress(task.label, 1 - remaining / total)
        each = max(_LEAST, (deadline - time.monotonic()) / remaining) * task.weight
        call = (_with_threads, task.world, threads, task.function, *task.args, each)
        results.append(pool.run(*call, timeout=max(120.0, 10 * seconds))[0])
        remaining -= task.share
    progress("done", 1.0)
    return results


def _with_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: compute with its share of the cores, as in training."""
    torch.set_num_threads(threads)
    return function(*args)


def _findings(tasks: list[_Task], results: list[Any]) -> _Findings:
    by_function: dict[Callable[..., Any], list[tuple[_Task, Any]]] = {}
    for task, result in zip(tasks, results, strict=True):
        by_function.setdefault(task.function, []).append((task, result))

    def points(function: Callable[..., Any]) -> tuple[Any, ...]:
        return tuple(point for _, found in by_function.get(function, []) for point in found)

    memory = {task.world: bandwidth for task, bandwidth in by_function[measure_memory]}
    return _Findings(points(measure_matmul), points(measure_attention), memory, points(measure_collectives))


def _own_cluster(machine: Machine, ranks: int, measured: Measured, memory_bandwidth: float) -> Cluster:
    """This machine as a cluster of one node. `memory_bandwidth` is that of one rank alone."""
    local = load_cluster("local")
    accelerator = _accelerator(machine, ranks, measured, memory_bandwidth)
    if not machine.devices:
        node = local.node.model_copy(update={"accelerators": ranks, "compute_slots": min(machine.cores, ranks)})
        return local.model_copy(update={"accelerator": accelerator, "node": node})
    node = local.node.model_copy(update={"accelerators": machine.devices, "compute_slots": None})
    fabric = local.fabric.model_copy(update={"domain": machine.devices})
    title = f"This machine, {machine.devices} x {machine.processor}"
    return local.model_copy(update={"title": title, "accelerator": accelerator, "node": node, "fabric": fabric})


def _accelerator(machine: Machine, ranks: int, measured: Measured, memory_bandwidth: float) -> Accelerator:
    """The catalogue's if it knows the GPU, with the memory that the driver gives; else one whose peaks were measured."""
    known = accelerator_of_device(machine.processor) if machine.devices else None
    if known:
        return load_accelerator(known).model_copy(update={"memory_bytes": machine.memory_bytes})
    peaks: dict[str, float] = {}
    for point in measured.matmul:
        if point.active == 1:
            peaks[point.precision] = max(point.flops_per_s, peaks.get(point.precision, 0.0))
    shared = f"One of {_count(ranks)} on {machine.processor}, {machine.cores} cores"
    return load_accelerator("cpu").model_copy(
        update={
            "name": machine.slug if machine.devices else f"cpu-{machine.slug}",
            "title": machine.processor if machine.devices else shared,
            "vendor": machine.vendor,
            "memory_bytes": machine.memory_bytes if machine.devices else machine.memory_bytes // ranks,
            "memory_bandwidth": memory_bandwidth,
            "memory_share": 1.0,
            "peak_flops": peaks,
            "matmul_share": dict.fromkeys(peaks, 1.0),
            "overhead_bytes": None if machine.devices else 0,
            "scale_up": _scale_up(machine, measured, memory_bandwidth),
            "confidence": "measured",
            "source": measured.source,
            "notes": "peak_flops, memory_bandwidth: the largest measured on one rank alone",
        }
    )


def _scale_up(machine: Machine, measured: Measured, memory_bandwidth: float) -> ScaleUp:
    """Links as fast as the largest message that one rank sent another."""
    sent = max((p for p in measured.collectives if p.op == "p2p"), key=lambda p: p.bytes, default=None)
    gloo = load_accelerator("cpu").scale_up
    if sent is None:  # one rank: a CPU may still be planned for with more, a lone GPU has no links that could be too slow
        return gloo.model_copy(update={"kind": "other", "bandwidth": memory_bandwidth}) if machine.devices else gloo
    rate = rounded(sent.bytes / sent.seconds)
    changes: dict[str, object] = {"bandwidth": rate, "pair_bandwidth": rate}
    if machine.devices:
        changes |= {"name": "measured point to point", "kind": "other", "topology": "switch"}
    return gloo.model_copy(update=changes)
