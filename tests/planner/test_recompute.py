"""The recompute that fits a memory budget is the quickest that there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from meshwright.api import recompute
from meshwright.cost.estimate import Estimator
from meshwright.cost.result import Price
from meshwright.planner.recompute import fit_recompute
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import RECOMPUTE_PARTS, Layout
from meshwright.spec.notation import parse_layout
from meshwright.spec.sizes import parse_bytes
from meshwright.spec.workload import Workload
from meshwright.train.recipe import Recipe, fit_memory

LAYOUTS = ("dp8:zero1 tp8:sp pp4 mb1", "dp2 tp8:sp pp8x2:zb-v mb1", "tp8:sp cp2:ring pp8 mb2", "dp8:zero3 tp4:sp mb1")
GIB = 2**30


def estimator() -> Estimator:
    return Estimator(replace(load_model("llama-3-70b"), layers=16), load_cluster("h100-superpod"), Workload(8192, 64))


def every_recompute(estimator: Estimator, layout: Layout) -> dict[Layout, Price]:
    """Without the search: all modes, all counts of layers."""
    lists = [parts for count in (1, 2, 3, 4) for parts in combinations(RECOMPUTE_PARTS, count)]
    modes = [{}, {"recompute": "full"}, *({"recompute": "selective", "recompute_parts": parts} for parts in lists)]
    out = {}
    for mode in modes:
        for layers in (None, *range(1, 17)) if mode else (None,):
            try:
                one = replace(layout, recompute_layers=layers, **mode)
                estimator.check(one)
            except UserError:
                continue
            out[one] = estimator.played(one)
    return out


@pytest.mark.parametrize("text", LAYOUTS)
def test_nothing_that_fits_is_quicker(text: str) -> None:
    its, layout = estimator(), parse_layout(text)
    every = every_recompute(its, layout)
    peaks = sorted({price.peak_bytes for price in every.values()})
    steps = []
    for budget in peaks[:: max(1, len(peaks) // 12)]:
        fitted = fit_recompute(its, layout, budget)
        assert fitted.best.peak_bytes <= budget
        assert fitted.best.step_time_s == pytest.approx(
            min(p.step_time_s for p in every.values() if p.peak_bytes <= budget)
        )
        steps.append(fitted.best.step_time_s)
    assert steps == sorted(steps, reverse=True), "more memory never makes a step longer"
    assert steps[0] > steps[-1]
    assert fit_recompute(its, layout, peaks[-1]).best.layout == layout


def test_a_budget_that_nothing_fits_says_by_how_much() -> None:
    its, layout = estimator(), parse_layout(LAYOUTS[0])
    least = min(every_recompute(its, layout).values(), key=lambda price: price.peak_bytes).peak_bytes
    with pytest.raises(UserError, match=r"^no recompute fits [\d.]+ GiB: .* still needs .*, 2\.0 GiB too much: try .*$"):
        fit_recompute(its, layout, least - 2 * GIB)
    assert fit_recompute(its, layout, least).best.peak_bytes == least


def test_a_recompute_of_ones_own_is_refused_beside_a_budget() -> None:
    for text in ("ac:full", "ac:norms+mlp:2"):
        with pytest.raises(UserError, match=f"leave {text.replace('+', '[+]')} out of the layout"):
            fit_recompute(estimator(), parse_layout(f"{LAYOUTS[0]} {text}"), GIB)


def test_the_api_reads_names_and_units() -> None:
    fitted = recompute(
        model="llama-3-70b", cluster="h100-superpod", layout=LAYOUTS[0], seq=8192, global_batch=256, memory_budget="40GiB"
    )
    assert 0 < fitted.extra < 0.1
    assert fitted.best.peak_bytes <= 40 * GIB < fitted.plain.peak_bytes


def test_training_takes_the_layout_that_fits() -> None:
    recipe = Recipe(model="llama-3-70b", layout=LAYOUTS[0], seq=8192, global_batch=256, memory_budget="40GiB")
    with pytest.raises(UserError, match=r"^memory_budget 40GiB .*: say which with --cluster$"):
        fit_memory(recipe)
    fitted, chosen = fit_memory(recipe.model_copy(update={"cluster": "h100-superpod"}))
    assert chosen is not None
    assert fitted.parsed_layout == chosen.best.layout
    assert fitted.parsed_layout.recompute != "none"
    assert fit_memory(fitted) == (fitted, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("60GiB", 60 * GIB), ("1.5 GB", 1_500_000_000), (4096, 4096), ("512", 512), ("2kB", 2000), ("1MiB", 2**20)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "60 gigs", "GiB", "-3GiB", "1e9", "60gib", "0", "0.1B", -5])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(UserError, match=r"^size .*(is not understood: write|must be at least 1 byte)"):
        parse_bytes(text)
