"""Schedules of one's own: read, checked, and refused by row, column and cell."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import Shape, shapes

from meshwright.schedule.csv import read_schedule, write_schedule
from meshwright.schedule.orders import make_schedule
from meshwright.spec.errors import UserError


def refusal(path: Path, text: str, stages: int, chunks: int, m: int) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_schedule(path, stages, chunks, m)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@settings(deadline=None, max_examples=50)
@given(shapes(4, 6), st.booleans())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, shape: Shape, communication: bool) -> None:
    name, stages, m, chunks = shape
    path = tmp_path_factory.mktemp("schedules") / f"{name}.csv"
    schedule = make_schedule(*shape)
    write_schedule(schedule, path, communication)
    assert read_schedule(path, stages, chunks, m) == schedule


def test_a_table_drawn_in_time_steps(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("F0, F1,,,B0, B1\n,F0,B0,F1,B1,\n")
    schedule = read_schedule(path, 2, 1, 2)
    assert schedule.name == "mine"
    assert schedule.actions == make_schedule("1f1b", 2, 2).actions


def test_a_table_as_spreadsheets_save_it(tmp_path: Path) -> None:
    """With a byte-order mark, carriage returns and commas after a comment."""
    path = tmp_path / "v.csv"
    path.write_bytes("\ufeff# Placement: V,,\r\nF0,F0.1,B0.1,B0\r\n".encode())
    assert read_schedule(path, 1, 2, 1).placement == ((0, 1),)
    path.write_bytes("\ufeff# placement: v\r\nF0,F0.1,I0.1,W0.1,I0,W0\r\nF0,F0.1,I0.1,I0,W0,W0.1\r\n".encode())
    assert read_schedule(path, 2, 2, 1).placement == ((0, 3), (1, 2))


@pytest.mark.parametrize("cell", ["F", "X0", "F0.", "F-1", "F2", "F0.2", "f0", "F0 F1", "0", "F0.1.1"])
def test_a_cell_that_says_nothing_is_named(tmp_path: Path, cell: str) -> None:
    said = refusal(tmp_path / "mine.csv", f"# one\nF0,F1,B0,B1\nF0,{cell},B0,B1\n", 2, 2, 2)
    assert f"row 3, column 2: {cell!r}: write F, B, I, W, sF, rF, sB, rB followed by a micro-batch from 0 to 1" in said
    assert ".1 to .1" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F0,B0\n", "1 rows for 2 stages"),
        ("# placement: w\nF0,B0\nF0,B0\n", "row 1: unknown placement 'w': legal: loop, v"),
        ("# placement: v\nF0,B0\nF0,B0\n", "a V places 2 chunks on each stage, not 1"),
        ("F0,F1,B0,B1\nF0,B0\n", "stage 1 lacks forward 1 of 2"),
        ("F0,F1,B0,B1\nB0,F0,F1,B1\n", "stage 1 does B0 before F0"),
        ("F0,F1,B0,B1,B1\nF0,F1,B0,B1\n", "stage 0 does B1 twice"),
        ("F0,F1,I0,W0,B1\nF0,F1,B0,B1\n", None),
        ("F0,B0,F1,B1\nF1,B1,F0,B0\n", "deadlocks: stage 0 waits in B0; stage 1 waits in F1"),
        ("F0,rB0,sF0,F1,sF1,rB1,B0,B1\nrF0,F0,rF1,F1,B0,sB0,B1,sB1\n", "deadlocks: stage 0 waits in rB0; stage 1 waits in rF1"),
        ("F0,F1,sF1,sF0,rB0,rB1,B0,B1\nrF0,rF1,F0,F1,B0,B1,sB0,sB1\n", "stage 0 sends sF1 to stage 1, which has rF0"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / "mine.csv"
    if said is None:
        path.write_text(text)
        read_schedule(path, 2, 1, 2)
    else:
        assert said in refusal(path, text, 2, 1, 2)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.csv: cannot be read"):
        read_schedule(tmp_path / "none.csv", 2, 1, 2)
    with pytest.raises(UserError, match=r"cannot be written"):
        write_schedule(make_schedule("1f1b", 2, 2), tmp_path / "no" / "mine.csv")
