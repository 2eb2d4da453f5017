"""The terminal sessions in the README and the docs are what the commands print."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from meshwright.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SESSIONS = [
    pytest.param(command, shown, id=f"{page.name}: {command[:60]}")
    for page in PAGES
    for command, shown in re.findall(r"```console\n\$ ([^\n]+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
]


def normal(text: str) -> list[str]:
    """Without the time a search took and the blanks at line ends."""
    return [re.sub(r", in [\d.]+ m?s$", "", line.rstrip()) for line in text.strip().splitlines()]


@pytest.mark.parametrize(("command", "shown"), SESSIONS)
def test_session(command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert normal(capsys.readouterr().out) == normal(shown)


def test_there_are_sessions() -> None:
    assert len(SESSIONS) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
