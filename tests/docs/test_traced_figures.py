"""docs/traced-figures.md is what its command writes, and what it says holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from traced_figures import HEAD, SECTIONS, left_by_a_forward, traced

PAGE = Path(__file__).parents[2] / "docs" / "traced-figures.md"


@pytest.mark.parity
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("section", SECTIONS, ids=lambda f: f.__name__)
def test_the_page_has_the_section_as_the_command_writes_it(section: Callable[[], str]) -> None:
    assert section() in PAGE.read_text()


def test_the_page_has_every_section_once() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    assert text.count("\n## ") == len(SECTIONS)


def test_sequence_parallelism_cuts_what_is_as_wide_as_a_hidden_state() -> None:
    """A stage of two layers of 70B: four hidden states a layer, and an eighth of them at TP 8."""
    wide = {}
    for sp, tokens in (("", 4096), (":sp", 512)):
        left = left_by_a_forward(traced("llama-3-70b", f"tp8{sp} pp40 mb1", 4096, 3, stage=1))
        wide[sp] = sum(nbytes for shape, nbytes in left.items() if shape[-1:] == (8192,) and shape[-2] == tokens)
    assert wide[""] == 8 * wide[":sp"]
    assert wide[":sp"] == (4 * 2 - 1) * 512 * 8192 * 2  # the stage's input was sent to it, and is not of its making


@pytest.mark.parity
def test_a_ring_keeps_as_much_a_token_whatever_the_sequence() -> None:
    each = []
    for cp, seq in ((4, 8192), (8, 65_536)):
        stage = traced("llama-3-8b", f"cp{cp}:ring pp32 mb1", seq, 32, stage=1)
        each.append(sum(left_by_a_forward(stage).values()) / (seq // cp))
    assert each[0] == pytest.approx(each[1], rel=0.001)
