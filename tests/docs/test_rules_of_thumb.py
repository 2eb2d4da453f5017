"""docs/rules-of-thumb.md is what its command writes, and what it says of the field's figures holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rules_of_thumb import THUMBS, Thumb, page, section, sequence_parallel, tensor_bytes

PAGE = Path(__file__).parents[2] / "docs" / "rules-of-thumb.md"


@pytest.mark.parametrize("thumb", THUMBS, ids=lambda f: f.__name__)
def test_the_page_has_the_section_as_the_command_writes_it(thumb: Callable[[], Thumb]) -> None:
    assert section(thumb()) in PAGE.read_text()


@pytest.mark.parity
def test_the_page_is_what_the_command_writes() -> None:
    assert page() == PAGE.read_text()


def test_what_is_quoted_and_right_is_reproduced() -> None:
    assert "20.0 GiB, 2.50 GiB" in sequence_parallel().arithmetic
    assert "50.3 MB each, 9.66 GB" in tensor_bytes().arithmetic  # 2 x 1 x 2048 x 12288 x 2 B, over 96 layers
    text = PAGE.read_text()
    for figure in (
        "17.5 MW",
        "25.2 GWh",
        "2.52 M USD",
        "25%, 50%, 75%, 100%, 75%, 75%, 100%, 75%, 50%, 25%",
        "349.2 GB",
        "59.2 B",
    ):
        assert figure in text
