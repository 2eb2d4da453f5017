"""What a person sees when their YAML is wrong: the file, the line, the value and what would be legal."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from meshwright.spec.errors import UserError
from meshwright.spec.files import write_text_atomically
from meshwright.spec.yaml_edge import parse_yaml, read_yaml, validate


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(Strict):
    width: int
    rate: float = 1.0


class Machine(Strict):
    name: str
    kind: Literal["fast", "slow"] = "fast"
    wired: bool = False
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    rates: dict[str, float] = {}

    @field_validator("name")
    @classmethod
    def _short(cls, name: str, info: ValidationInfo) -> str:
        if len(name) > 8:
            raise UserError(f"a name has at most 8 letters, got {len(name)}")
        return name


def read(text: str) -> Machine:
    return validate(Machine, parse_yaml(text, "m.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\nnaem: b\n",
            "m.yaml, line 2: naem: unknown key 'naem': did you mean name? legal: name, kind, wired, part, parts",
        ),
        (
            "name: a\npart:\n  widht: 3\n  width: 3\n",
            "line 3: part.widht: unknown key 'widht': did you mean width?",
        ),
        ("name: a\npart: {with: 3}\n", "unknown key 'with': did you mean width? legal: width, rate (and 1 more)"),
        ("name: a\nparts:\n  - width: 3\n  - wide: 3\n    width: 4\n", "m.yaml, line 4: parts.1.wide: unknown key 'wide'"),
        ("name: a\npart:\n  rate: 3\n", "m.yaml, line 2: part.width: missing; required here: width"),
        ("kind: fast\n", "m.yaml, line 1: name: missing; required here: name"),
        ("name: a\nkind: fest\n", "m.yaml, line 2: kind: unknown value 'fest': did you mean fast? legal: fast, slow"),
        ("name: a\npart:\n  width: many\n", "m.yaml, line 3: part.width: must be a whole number, got 'many'"),
        ("name: a\npart:\n  width: 2.5\n", "m.yaml, line 3: part.width: must be a whole number, got 2.5"),
        ("name: a\nrates:\n  x: 1\n  y: z\n", "m.yaml, line 4: rates.y: must be a number, got 'z'"),
        ("name: a\npart: 3\n", "m.yaml, line 2: part: must be a group of keys, got 3"),
        ("name: a\nparts: 3\n", "m.yaml, line 2: parts: must be a list, got 3"),
        ("name: 12\n", "m.yaml, line 1: name: must be text (put it in quotes), got 12"),
        ("name: a\nwired: perhaps\n", "m.yaml, line 2: wired: must be true or false, got 'perhaps'"),
        ("kind: fast\nname: much-too-long\n", "m.yaml, line 2: name: a name has at most 8 letters, got 13"),
    ],
)
def test_wrong_values_are_named_with_their_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(text)


def test_the_first_error_is_told_and_the_rest_counted() -> None:
    with pytest.raises(UserError, match=r"^m.yaml, line 2: kind: unknown value 'no': .* \(and 2 more\)$"):
        read("name: a\nkind: no\nwired: hm\npart: 3\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\npart: width: 3\n", "m.yaml, line 2, column 12: not valid YAML: mapping values are not allowed"),
        ("name: a\npart: width: 3\n", "found 'part: width: 3'"),
        ("name: [a\n", "m.yaml, line 2, column 1: not valid YAML: "),
        ("name: [a\n", "; found the end of the text"),
        ("name: a\n\tkind: b\n", r"found '\tkind: b'"),
        ("name: !thing a\n", "m.yaml, line 1, column 7: not valid YAML: could not determine a constructor"),
        ("name: *nobody\n", "m.yaml, line 1, column 7: not valid YAML: found undefined alias"),
        ("name: a\n---\nname: b\n", "m.yaml, line 2, column 1: not valid YAML: but found another document"),
        ("name: a\nkind: \x07\n", "m.yaml, line 2: not valid YAML: character"),
        ("name: a\nkind: b\nname: c\n", "m.yaml, line 3: key 'name' is already set on line 1"),
        ("part: {width: 1, width: 2}\n", "m.yaml, line 1: key 'width' is already set on line 1"),
        ("", "m.yaml: must hold keys and values (`name: ...`), found nothing"),
        ("- a\n- b\n", "m.yaml: must hold keys and values (`name: ...`), found '- a'"),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_yaml(text, "m.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"bytes.yaml: not a text file in UTF-8 \(byte 6 is 0xff\)"):
        read_yaml(tmp_path / "bytes.yaml")


def test_numbers_and_words_follow_yaml_1_2() -> None:
    text = "a: 80e9\nb: 1.5e9\nc: 1e-6\nd: 010\ne: 12:30\nf: yes\ng: 2026-08-22\nh: 1_000\ni: -.5\nj: ~\nk: true\nl: '1'\n"
    data = parse_yaml(text, "m.yaml")
    assert dict(data) == {
        "a": 80e9,
        "b": 1.5e9,
        "c": 1e-6,
        "d": 10,
        "e": "12:30",
        "f": "yes",
        "g": "2026-08-22",
        "h": 1000,
        "i": -0.5,
        "j": None,
        "k": True,
        "l": "1",
    }
    assert type(data["d"]) is int
    part = validate(Part, parse_yaml("width: 80e9\nrate: 3e9\n", "m.yaml"))
    assert part.width == 80_000_000_000
    assert type(part.width) is int


def test_a_merged_key_keeps_its_line() -> None:
    text = "name: a\nparts:\n  - &base\n    width: 1\n    rate: 2\n  - <<: *base\n    width: x\n"
    assert read(text.replace("x", "3")).parts[1] == Part(width=3, rate=2)
    with pytest.raises(UserError, match=r"line 7: parts\.1\.width"):
        read(text)


def test_plain_data_is_named_by_its_source() -> None:
    with pytest.raises(UserError, match=r"^the flags: part\.width: must be a whole number"):
        validate(Machine, {"name": "a", "part": {"width": "x"}}, "the flags")


def test_write_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.yaml"
    write_text_atomically(path, "one\n")
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    write_text_atomically(link, "two\n")
    assert path.read_text() == "two\n"
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out.yaml: cannot be written: No space left on device"):
        write_text_atomically(path, "three\n")
    assert path.read_text() == "two\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.yaml", "out.yaml"]


def test_write_into_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_text_atomically(tmp_path / "no" / "out.yaml", "x")
