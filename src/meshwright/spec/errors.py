"""The one exception that means "the person who typed this can fix it"."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input, said in the user's words: what was given, what is legal, what to try.

    The command line shows the message alone and exits with status 2.
    """


def choices(given: str, legal: Iterable[str], what: str) -> UserError:
    """The refusal of a name that is not in a list, with the nearest legal names first."""
    legal = list(legal)
    near = get_close_matches(given, legal, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown {what} {given!r}: {hint}legal: {', '.join(legal)}")
