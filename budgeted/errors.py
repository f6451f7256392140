"""Errors that end a command in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done: one line, exit code 2, nothing written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A closing phrase that names the closest of `known`, or all of them where none is close."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
