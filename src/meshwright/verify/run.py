"""`meshwright verify`, from words to results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.parallel.ranks import RankPool
from meshwright.spec.errors import choices
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.legality import refuse_unbuilt, refuse_unrunnable_model
from meshwright.spec.notation import parse_layout
from meshwright.verify.check import TOLERANCE, Verification, Verifier
from meshwright.verify.matrix import Matrix, parity_matrix
from meshwright.verify.ranks import Sabotage

DENSE_MODEL, SPARSE_MODEL = "llama-3-8b", "mixtral-8x7b"
"""What is shrunk when no model is given: the second where the layout splits experts."""


def verify(
    layout: str, model: str | None = None, precision: str = "fp64", sabotage: Sabotage | None = None
) -> Verification:
    """Run a shrunk `model` under `layout` on local processes, in `precision`, against one process.

    Raises UserError for a layout, model or precision that cannot be verified. `sabotage`: for tests, run in every rank first.
    """
    if precision not in TOLERANCE:
        raise choices(precision, TOLERANCE, "precision to verify in")
    parsed = replace(parse_layout(layout), precision=precision)  # type: ignore[arg-type]
    refuse_unbuilt(parsed)
    loaded = load_model(model or (SPARSE_MODEL if parsed.ep > 1 or parsed.etp > 1 else DENSE_MODEL))
    refuse_unrunnable_model(loaded)
    with _pool() as pool, Console(stderr=True).status(f"running {parsed} on {parsed.world} local ranks"):
        return Verifier(loaded, pool, sabotage).verify(parsed)


def verify_matrix(model: str | None = None, count: int = 1, ranks: int = 8, seed: int = 0) -> Matrix:
    """Verify layouts that cover every pair of modes, at least `count`, and sort their errors by pairs."""
    loaded = load_model(model or SPARSE_MODEL)
    refuse_unrunnable_model(loaded)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with _pool() as pool, Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("choosing layouts", total=None)

        def progress(done: int, total: int, layout: Layout) -> None:
            bar.update(task, completed=done, total=total, description=str(layout))

        return parity_matrix(Verifier(loaded, pool), loaded, count, ranks, progress, seed)


@contextmanager
def _pool() -> Iterator[RankPool]:
    pool = RankPool()
    try:
        yield pool
    finally:
        pool.close()
