"""The keys of a config, each read as the type it must have, with errors that name the key, the value and what is legal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from meshwright.spec.errors import UserError


@dataclass(frozen=True, slots=True)
class Keys:
    """Typed access to a config by the names most families use; `aliases` holds a family's own.

    A null counts as absent, except in `optional`. Every reader raises UserError for a key that is missing and has no
    default, or whose value is not of its kind; `source` stands in front of each error.
    """

    config: Mapping[str, Any]
    source: str
    aliases: Mapping[str, str] = field(default_factory=dict)

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        what = f"an integer of at least {minimum}"
        value: int = self._get(name, int, what, default)
        if value < minimum:
            raise self.error(f"{self._own(name)} must be {what}, got {value}")
        return value

    def optional(self, name: str, default: int | None, minimum: int = 1) -> int | None:
        """An integer for which null says something: no window, no compression."""
        own = self._own(name)
        if own not in self.config:
            return default
        return None if self.config[own] is None else self.integer(name, minimum=minimum)

    def number(self, name: str, default: float | None = None) -> float:
        value = float(self._get(name, (int, float), "a positive number", default))
        if not 0 < value < inf:  # JSON as Python reads it has NaN and Infinity
            raise self.error(f"{self._own(name)} must be a positive number, got {value}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._get(name, bool, "true or false", default))

    def text(self, name: str, default: str) -> str:
        return str(self._get(name, str, "a string", default))

    def several(self, name: str, kind: type) -> list[Any]:
        """A list; an empty one if it is absent."""
        value: list[Any] = self._get(name, list, f"a list of {kind.__name__}", [])
        if not all(isinstance(item, kind) for item in value):
            raise self.error(f"{self._own(name)} must be a list of {kind.__name__}, got {value!r}")
        return value

    def within(self, name: str) -> Keys:
        """The keys of a nested object; none if it is absent."""
        return Keys(self._get(name, dict, "an object", {}), f"{self.source}: {name}")

    def require(self, name: str, legal: object, why: str) -> None:
        """Refuse what a Model cannot describe. Absent is legal: no family's default needs refusing."""
        value = self.config.get(name)
        if value is not None and value != legal:
            raise self.error(f"{name} {json.dumps(value)} is not supported: {why}")

    def _own(self, name: str) -> str:
        """The family's own name, unless the file has only the common one: transformers reads both."""
        own = self.aliases.get(name, name)
        return name if own not in self.config and name in self.config else own

    def _get(self, name: str, kind: type | tuple[type, ...], what: str, default: Any) -> Any:
        own = self._own(name)
        value = self.config.get(own)
        if value is None:
            if default is None:
                raise self.error(f"missing key {own}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{own} must be {what}, got {value!r}")
        return value
