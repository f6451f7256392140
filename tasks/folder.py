"""A data folder's summary, and how what is wrong with a folder is said: one line with a way to mend it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgeted.errors import UserError

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Data:
    """A training set and its validation set. missing: paths that are listed but absent or unreadable, those
    among them that mode=prepare took off the list.

    left_out: how many training images the upstream does not train on, as nothing is annotated in them. passed_over:
    paths among the samples that are none, known after layouts.check. digest: 12 hex digits that tell this set from
    another of the same counts, wherever it lies and however it is stored (see digest_of): the same for class folders
    and their packed copy, for both of CIFAR-10's formats, for any data.subset, and whether or not a listed clip is
    there. None where the data are not.
    """

    name: str
    root: Path
    n_train: int
    n_val: int
    classes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    left_out: int = 0
    passed_over: tuple[str, ...] = ()
    digest: str | None = None


def digest_of(classes: Sequence[str], *splits: Any) -> str:
    """A set in 12 hex digits: of a SHA-256 over the class names in their order and what each split has of them."""
    return hashlib.sha256(json.dumps([classes, *splits]).encode()).hexdigest()[:12]


def tally(classes: Sequence[str], labels: Iterable[int]) -> list[int]:
    """How many of the labels are of each class."""
    counts = Counter(labels)
    return [counts[index] for index in range(len(classes))]


def wrong(root: Path, what: str, fix: str) -> UserError:
    return UserError(f"data.root={root}: {what}: {fix}")


def refuse_outside(root: Path, name: str, source: str) -> None:
    """Raise UserError for a name that `source` gives and that is not a relative path within root."""
    if name in ("", ".") or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise wrong(root, f"{source} names {name!r}, which leads out of the folder", "give a relative path without ..")


def names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones; none where it is absent."""
    try:
        return sorted(n for n in os.listdir(folder) if not n.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def near(word: str, folder: Path) -> str:
    """A closing phrase that names what a folder holds instead of `word`."""
    there = [name for name in names(folder) if name != word]
    close = difflib.get_close_matches(word, there, n=1, cutoff=0.55)
    return f"did you mean {close[0]!r}?" if close else f"the folder holds {some(there) if there else 'nothing'}"


def some(items: Iterable[str], shown: int = 1) -> str:
    """A count and the first of the items, for a message of one line."""
    items = list(items)
    first = ", ".join(in_line(item) for item in items[:shown])
    return f"{len(items)} ({first}{', ...' if len(items) > shown else ''})"


def in_line(name: str) -> str:
    """A file's name with its line breaks and undecodable bytes written out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
