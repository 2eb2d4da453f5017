"""`meshwright verify`, from words to results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.parallel.ranks import RankPool
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import PRECISIONS, Precision
from meshwright.spec.legality import refuse_unbuilt, refuse_unrunnable_model
from meshwright.spec.model import Model
from meshwright.spec.notation import parse_layout
from meshwright.verify.check import TOLERANCE, Verification, Verifier
from meshwright.verify.feed import check_feed
from meshwright.verify.matrix import Matrix, parity_matrix
from meshwright.verify.sweep import KINDS, Case, sweep_models

DENSE_MODEL, SPARSE_MODEL = "llama-3-8b", "mixtral-8x7b"
"""What is shrunk when no model is given: the second where the layout splits experts."""

MOST_RANKS = 64
"""Every rank is a process of this machine. A bug of the engine that shows only above would be new: the modes matter, not the degrees."""


def verify(layout: str, model: str | None = None, precision: str | None = None, batch: str | None = None) -> Verification:
    """Run a shrunk `model` under `layout` on local processes against one process. `precision`: instead of the layout's; fp64 where
    neither says one. `batch`: a kind of those that `verify.feed` has.

    Raises UserError for a layout, model, precision or batch that cannot be verified.
    """
    parsed = replace(parse_layout(layout), precision=_precision(precision or _given_precision(layout)))
    refuse_unbuilt(parsed)
    if parsed.world > MOST_RANKS:
        raise UserError(
            f"'{parsed}' has {parsed.world} ranks, and every one would be a process of this machine: at most {MOST_RANKS}; "
            "try smaller degrees of the same axes, with the same modes"
        )
    loaded = _model(model or (SPARSE_MODEL if parsed.ep > 1 or parsed.etp > 1 else DENSE_MODEL))
    feed = check_feed(batch or "packed", loaded)
    with _pool() as pool, Console(stderr=True).status(f"running {parsed} on {parsed.world} local ranks"):
        return Verifier(loaded, pool).verify(parsed, feed)


def verify_matrix(
    model: str | None = None, count: int = 0, ranks: int = 8, precision: str | None = None
) -> Iterator[Matrix]:
    """Verify layouts that cover every pair of modes, and every mode with every kind of batch, at least `count` a matrix. One matrix for
    `model`; without one, for dense models of different structure and for sparse ones. Of each, one in fp64 and one in fp32, or
    in the `precision` that is given.

    Raises UserError for a model or precision that cannot be verified, or `ranks` that leave no layout.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise UserError(f"the matrix is of layouts of 2 to {MOST_RANKS} ranks, got {ranks}: try 8")
    precisions = tuple(TOLERANCE) if precision is None else (_precision(precision),)
    swept: dict[str, tuple[Model, ...]]
    swept = {kind: sweep_models(kind) for kind in KINDS} if model is None else {model: (_model(model),)}
    return _matrices(swept, precisions, count, ranks)


def _matrices(
    swept: Mapping[str, tuple[Model, ...]], precisions: Sequence[Precision], count: int, ranks: int
) -> Iterator[Matrix]:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with _pool() as pool, Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("choosing layouts", total=None)

        def progress(done: int, total: int, case: Case) -> None:
            bar.update(task, completed=done, total=total, description=str(case.layout))

        for precision in precisions:
            for title, models in swept.items():
                yield parity_matrix(title, models, pool, progress, count=count, ranks=ranks, precision=precision)


def _given_precision(layout: str) -> str | None:
    """A Layout has a precision always; here it matters whether one was written."""
    return next((token for token in layout.split() if token in PRECISIONS), None)


def _precision(name: str | None) -> Precision:
    """fp64 unless another is named."""
    if name is not None and name not in TOLERANCE:
        raise UserError(
            f"precision {name}: verify tells a mistake from rounding in {' or '.join(TOLERANCE)}: leave it out of the layout, or "
            "override it with --precision fp64"
        )
    return name or "fp64"


def _model(name: str) -> Model:
    model = load_model(name)
    refuse_unrunnable_model(model)
    return model


@contextmanager
def _pool() -> Iterator[RankPool]:
    pool = RankPool()
    try:
        yield pool
    finally:
        pool.close()
