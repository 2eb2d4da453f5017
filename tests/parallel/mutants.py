"""The engine with one collective taken out: what the parity checks must notice.

A mutant is a change to the text of one module of `parallel/`. A rank re-executes the engine's modules with it, runs, and
re-executes them unchanged.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import workers

from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

ENGINE = ("collectives", "vocab", "tensor", "mesh", "data", "pipeline", "apply")
"""Modules of `meshwright.parallel`, each after those that it imports."""

DONE = 'type("Done", (), {"wait": lambda self: None})()'


@dataclass(frozen=True)
class Mutant:
    """`edits` of `module`; `layout` and `model` is where it must show."""

    what: str
    module: str
    edits: tuple[tuple[str, str], ...]
    layout: str
    model: str = "untied"

    def __str__(self) -> str:
        return self.what


MUTANTS = (
    Mutant(
        "tp: no all-reduce after row-parallel and embedding",
        "collectives",
        (("        group.all_reduce(x)\n", ""),),
        "tp2 mb4",
    ),
    Mutant(
        "tp: no reduce-scatter after row-parallel and embedding",
        "collectives",
        (("    group.reduce_scatter(out, tensor.contiguous())", "    out.copy_(tensor.chunk(group.size)[group.index])"),),
        "tp2:sp mb4",
    ),
    Mutant(
        "tp: no all-gather of the gradient into row-parallel",
        "collectives",
        (("    group.all_gather(out, tensor.contiguous())", "    out.copy_(tensor.repeat(group.size, 1))"),),
        "tp2:sp mb4",
    ),
    Mutant(
        "tp: no all-gather into column-parallel",
        "tensor",
        (("            group.all_gather(whole, x)", "            whole.copy_(x.repeat(group.size, 1))"),),
        "tp2:sp mb4",
    ),
    Mutant(
        "tp: no second all-gather for the weight gradient",
        "tensor",
        (
            (
                "regather = group.all_gather(x, local, wait=False)",
                f"x.copy_(local.repeat(group.size, 1)); regather = {DONE}",
            ),
        ),
        "tp2:sp mb4",
    ),
    Mutant(
        "tp: no reduce-scatter of dx",
        "tensor",
        (
            (
                "reduction = group.reduce_scatter(dx_out, dx, wait=False)",
                f"dx_out.copy_(dx.chunk(group.size)[group.index]); reduction = {DONE}",
            ),
        ),
        "tp2:sp mb4",
    ),
    Mutant(
        "tp: no all-reduce of dx",
        "tensor",
        (("reduction = group.all_reduce(dx_out, wait=False)", f"reduction = {DONE}"),),
        "tp2 mb4",
    ),
    Mutant(
        "tp: no all-reduce of the largest logit",
        "vocab",
        (("        group.all_reduce(top, op=dist.ReduceOp.MAX)\n", ""),),
        "tp2 mb4",
    ),
    Mutant("tp: no all-reduce of the loss's sums", "vocab", (("        group.all_reduce(sums)\n", ""),), "tp2 mb4"),
    Mutant(
        "dp: no all-reduce of gradients",
        "data",
        (("handle = group.all_reduce(bucket.gradients, wait=False)", f"handle = {DONE}"),),
        "dp2 mb2",
    ),
    Mutant(
        "dp: no reduce-scatter of gradients (ZeRO-1)",
        "data",
        (
            (
                "handle = group.reduce_scatter(bucket.gradients[bucket.owned], bucket.gradients, wait=False)",
                f"handle = {DONE}",
            ),
        ),
        "dp2:zero1 mb2",
    ),
    Mutant(
        "dp: no all-gather of parameters (ZeRO-1)",
        "data",
        (("                gathers.append(group.all_gather(bucket.parameters, own, wait=False))", "                pass"),),
        "dp2:zero1 mb2",
    ),
    *(
        Mutant(
            f"{where}: replicas' gradients not summed",
            "data",
            (
                (
                    "            if bucket.plan.partial and bucket.plan.replicas:",
                    f'            if bucket.plan.partial and bucket.plan.replicas != "{name}":',
                ),
            ),
            layout,
            model,
        )
        for where, name, layout, model in (
            ("tp (sequence-parallel norms)", "tp", "tp2:sp mb4", "untied"),
            ("tp (norms of queries and keys)", "tp", "tp2 mb4", "qk-norm"),
            ("tp (shared key-value heads)", "kv", "tp2 mb4", "few-kv-heads"),
            ("pp (tied embedding)", "embedding", "pp2 mb2", "tied"),
        )
    ),
    Mutant(
        "dp: tokens not counted over ranks", "apply", (('        self.mesh["dp"].all_reduce(counted)\n', ""),), "dp2 mb2"
    ),
    *(
        Mutant(
            f"{axis}: loss and gradient norm not summed",
            "apply",
            (("return self.mesh.sum_over(figures)", f"return self.mesh.sum_over(figures, {axes})"),),
            "dp2 tp2:sp pp2 mb2",
        )
        for axis, axes in (("tp", ("cp", "pp", "dp")), ("pp", ("tp", "cp", "dp")), ("dp", ("tp", "cp", "pp")))
    ),
    Mutant(
        "pp: activations not sent",
        "pipeline",
        (("return self.outputs[action.micro_batch].detach()", "return self.outputs[action.micro_batch].detach() * 0"),),
        "pp2 mb2",
    ),
    Mutant(
        "pp: gradients not sent", "pipeline", (("        return gradient\n", "        return gradient * 0\n"),), "pp2 mb2"
    ),
    Mutant("scale: loss divided by the count twice", "pipeline", (("* self.scale", "* self.scale * self.scale"),), "mb4"),
    Mutant("scale: every tp rank counts the loss", "apply", (("loss.double() * alone", "loss.double()"),), "tp2 mb4"),
    Mutant(
        "scale: every dp rank counts the norm", "data", (("        shared = ", "        shared = False and "),), "dp2 mb2"
    ),
    Mutant("scale: every replica counts the norm", "data", (("self.mesh.owns(bucket.plan.replicas)", "True"),), "tp2 mb4"),
)


def run_mutant(
    mutant: Mutant | None, model: Model, workload: Workload, layout: Layout
) -> tuple[list[float], workers.Gradients, list[float]]:
    """(figures and gradients of step 1, losses of three steps) with the mutant in place; None: the engine as it is."""
    with installed(mutant):
        figures, gradients = workers.gradients_of_step_1(model, workload, layout)
        return figures, gradients, workers.losses(model, workload, layout, 3)


@contextmanager
def installed(mutant: Mutant | None) -> Iterator[None]:
    if mutant is None:
        yield
        return
    try:
        _execute(mutant)
        yield
    finally:
        _execute(None)


def _execute(mutant: Mutant | None) -> None:
    for name in (*(f"meshwright.parallel.{name}" for name in ENGINE), "meshwright.train.optimizer", "workers"):
        module = importlib.import_module(name)
        source = Path(str(module.__file__)).read_text()
        if mutant is not None and name.endswith(f"parallel.{mutant.module}"):
            for old, new in mutant.edits:
                assert source.count(old) == 1, f"{mutant}: {old!r} stands {source.count(old)} times in {name}"
                source = source.replace(old, new)
        exec(compile(source, str(module.__file__), "exec"), module.__dict__)
