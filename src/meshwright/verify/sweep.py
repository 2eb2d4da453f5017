"""What the parity sweep verifies: layouts dealt over models of different structure and over kinds of batches.

Dense and sparse layouts cover every pair of modes on their own, and within each, every mode meets every model that can have it,
every kind of batch, and key-value heads that are fewer than the ranks that need them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice, zip_longest
from typing import Literal, get_args

from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.verify.feed import Feed, feeds
from meshwright.verify.layouts import MOST_RANKS, Features, cover, features, legal_layouts, modes

Kind = Literal["dense", "sparse"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FEW = 2
"""Key-value heads of the models that have fewer of them than ranks of tp4."""


@dataclass(frozen=True)
class Case:
    """One layout, of one model, on one kind of batch."""

    model: Model
    layout: Layout
    feed: Feed

    def __str__(self) -> str:
        return f"{self.model.name}, {self.feed}, {self.layout}"

    @property
    def features(self) -> Features:
        """What the layout covers, and each of its modes with the model, with the batch and with shared heads."""
        fixtures = {("model", self.model.name), ("batch", self.feed)}
        if self.shares_heads:
            fixtures.add(("heads", "shared"))
        return features(self.layout) | {(*fixture, mode) for fixture in fixtures for mode in modes(self.layout)}

    @property
    def shares_heads(self) -> bool:
        """Whether several ranks hold the same key-value heads, because there are too few."""
        return self.model.latent is None and self.layout.tp * self.layout.cp_ulysses > self.model.kv_heads


@lru_cache
def sweep_models(kind: Kind) -> tuple[Model, ...]:
    """Tied and untied, with as many key-value heads as queries, with some and with fewer than ranks; of the sparse ones also with
    groups, a shared expert and latent attention, and with sinks, windows and biases."""
    if kind == "dense":
        return (*(load_model(name) for name in ("qwen3-8b", "llama-3.2-1b", "gpt2")), _few(load_model("qwen2-72b")))
    tied = replace(load_model("qwen3-30b-a3b"), tied=True)
    return (*(load_model(name) for name in ("mixtral-8x7b", "deepseek-v3", "gpt-oss-20b")), _few(tied))


def _few(model: Model) -> Model:
    tied = ", tied" if model.tied else ""
    return replace(model, name=f"{model.name} with {FEW} key-value heads{tied}", kv_heads=FEW)


def draw_cases(models: tuple[Model, ...], count: int, *, ranks: int = MOST_RANKS, seed: int = 0) -> tuple[Case, ...]:
    """A covering set, and as many more, models and batches in turn, as make `count` distinct layouts; the same for the same seed. fp64.

    Raises UserError when `ranks` leaves none.
    """
    candidates = legal_cases(models, ranks, seed)
    chosen = cover(candidates, lambda case: case.features)
    taken = {case.layout for case in chosen}
    spare = {case.layout: case for case in reversed(candidates) if case.layout not in taken}
    return (*chosen, *islice(reversed(spare.values()), max(0, count - len(taken))))


def sample(ranks: int = MOST_RANKS, seed: int = 0) -> tuple[Case, ...]:
    """A few cases of all models of the sweep that cover every pair of modes, every triple of axes at 8 ranks, every model with every
    batch, expert parallel with each, and shared heads with every mode."""

    def wanted(case: Case) -> Features:
        meetings = {feature for feature in case.features if feature[-1] == "ep" or feature[0] == "heads"}
        return features(case.layout) | meetings | {("fixtures", case.model.name, case.feed)}

    return tuple(cover([case for kind in KINDS for case in legal_cases(sweep_models(kind), ranks, seed)], wanted))


@lru_cache
def legal_cases(models: tuple[Model, ...], ranks: int, seed: int) -> tuple[Case, ...]:
    """Every legal layout of every model, models in turn, on one kind of batch each, in turn. Raises UserError when there is none."""
    dealt = [
        [
            Case(model, layout, feed)
            for layout, feed in zip(legal_layouts(model, ranks, seed + i), cycle(feeds(model)), strict=False)
        ]
        for i, model in enumerate(models)
    ]
    cases = tuple(case for turn in zip_longest(*dealt) for case in turn if case is not None)
    if not cases:
        raise UserError(f"{ranks} rank(s) leave no layout of {models[0].name} to verify: take 2 or more")
    return cases
