"""Errors that end a command in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user asked for cannot be done: one line, exit code 2, nothing written.

    `in_run`: a run found it, in a file say. Then that run has failed like any other, and the exit code is 1.
    """

    in_run = False


def nearest(word: str, known: Iterable[str]) -> str:
    """A closing phrase that names the closest of `known`; all of them where none is close and they are few."""
    names = sorted(map(str, known))
    cutoff = 0.55 if len(names) <= 24 else 0.0
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
