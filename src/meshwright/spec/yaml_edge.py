"""The edge where a person's YAML comes in: what is wrong is said with its file, its line and what would be legal.

Numbers and booleans follow YAML 1.2: `80e9` is a number (YAML 1.1 makes it text), `yes` is text, `010` is ten and
`12:30` is not a count of minutes. A whole-number field takes `80e9` too, since its value is whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from meshwright.spec.errors import UserError, choices

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML built without libyaml: slower, same answers
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

ModelT = TypeVar("ModelT", bound=BaseModel)
KeyPath = Sequence[str | int]
"""Keys and list positions from the top of a document down to one value."""

_NUMBER_START = list("-+.0123456789")
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "dict_type": "a group of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}
"""pydantic's error types in the words of someone who writes YAML."""


class _Loader(_SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", _NUMBER_START),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _NUMBER_START,
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class Document(dict[str, Any]):
    """The mapping read from one YAML text, which remembers where each key stood."""

    def __init__(self, data: Mapping[str, Any], source: str, root: yaml.MappingNode) -> None:
        super().__init__(data)
        self.source = source
        self._root = root

    def line(self, path: KeyPath) -> int:
        """The line (from 1) of the key or list item at `path`, or of the nearest parent that exists."""
        node: yaml.Node = self._root
        line: int = node.start_mark.line
        for part in path:
            if isinstance(node, yaml.MappingNode):
                # From the end, because a merge (<<) puts the merged keys in front of the ones that override them.
                found = next(((key, value) for key, value in reversed(node.value) if key.value == str(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return line + 1


def read_yaml(path: str | Path) -> Document:
    """The top-level mapping of a YAML file. `UserError` if it is missing, unreadable, malformed or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start} is {byte:#04x})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """The top-level mapping of a YAML text; `source` names the text in errors."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                found = "nothing" if root is None else f"{_shorten(text.strip())!r}"
                raise UserError(f"{source}: must hold keys and values (`name: ...`), found {found}")
            _refuse_duplicate_keys(root, source)
            data = loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, text, source) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source}, line {line}: not valid YAML: character {error.character!r} is not allowed") from None
    return Document(data, source, root)


def validate(model_class: type[ModelT], data: Mapping[str, Any], source: str | None = None) -> ModelT:
    """`data` as a `model_class`, or a `UserError` that names the first wrong key, its line, its value and what is legal.

    Lines are known when `data` came from `read_yaml` or `parse_yaml`; `source` is then needless.
    """
    try:
        return model_class.model_validate(data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    # A misspelt key is also a missing one: the misspelling is what the person can see and mend.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    path = _path(data, first)
    where = source or "input"
    if isinstance(data, Document):
        where = f"{source or data.source}, line {data.line(path)}"
    dotted = ".".join(str(part) for part in path)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise UserError(f"{where}: {dotted + ': ' if dotted else ''}{_explain(model_class, first, path)}{more}")


def _malformed(error: yaml.MarkedYAMLError, text: str, source: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context
    if mark is None:
        return UserError(f"{source}: not valid YAML: {problem}")
    lines = text.splitlines()
    found = f"; found {_shorten(lines[mark.line].rstrip())!r}" if mark.line < len(lines) else "; found the end of the text"
    return UserError(f"{source}, line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}{found}")


def _refuse_duplicate_keys(root: yaml.Node, source: str) -> None:
    """PyYAML keeps the last of two equal keys and says nothing."""
    pending, seen = [root], {id(root)}
    while pending:
        node = pending.pop()
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if (before := first.get(key.value)) is not None:
                        raise UserError(f"{source}, line {line}: key {key.value!r} is already set on line {before}")
                    first[key.value] = line
                children.append(value)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            if id(child) not in seen:  # an alias (*name) leads to a node already queued
                seen.add(id(child))
                pending.append(child)


def _path(data: Mapping[str, Any], error: ErrorDetails) -> tuple[str | int, ...]:
    """pydantic's location without its union tags: only what stands in the data, and the key that is missing."""
    path: list[str | int] = []
    value: Any = data
    for part in error["loc"]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _explain(model_class: type[BaseModel], error: ErrorDetails, path: KeyPath) -> str:
    kind, given = error["type"], error["input"]
    if kind in ("extra_forbidden", "missing"):
        fields = {name: field for model in _models_at(model_class, path[:-1]) for name, field in model.model_fields.items()}
        if kind == "extra_forbidden":
            return str(choices(str(path[-1]), fields, "key"))
        return f"missing; required here: {', '.join(name for name, field in fields.items() if field.is_required())}"
    if kind == "literal_error":
        return str(choices(str(given), re.split(", | or ", error["ctx"]["expected"].replace("'", "")), "value"))
    if kind == "value_error":
        return str(error["ctx"]["error"])
    expected = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"must be {expected}, got {_shorten(repr(given))}"


def _models_at(model_class: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models whose fields are the legal keys at `path`."""
    models = [model_class]
    for part in path:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:  # else a list position or a free key, inside the same annotation
            models = [found for field in fields for found in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _shorten(text: str) -> str:
    text = text.splitlines()[0] if text else text
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
