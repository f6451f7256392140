"""metrics.jsonl: whole lines in the order they were made. A checkpoint remembers how far it reached, and its digest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from budgeted.files import atomic, finite

log = logging.getLogger("budgeted")


class Journal:
    """Rows appended to `path` as lines. A row is in the file whole or not at all, whatever fails.

    It opens at a `mark` (None: empty), so that no line is doubled by a resume. A file that is not what stood there
    at that mark keeps the whole lines of steps before `step`, those of evaluations before `evaluated`, and the log
    says so.
    """

    def __init__(self, path: Path, mark: dict[str, Any] | None = None, step: int = 0, evaluated: int = 0) -> None:
        kept = _kept(path, mark, step, evaluated)
        self._digest, self._end = hashlib.sha256(kept), len(kept)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; NaN and infinities become null. Where there is no room for a whole line, none is left."""
        line = (json.dumps(finite(row)) + "\n").encode()
        try:
            left = line
            while left:
                left = left[self._file.write(left) :]
        except BaseException:
            self._file.truncate(self._end)
            raise
        self._digest.update(line)
        self._end += len(line)

    def sync(self) -> None:
        """Return once all that was written is on the disk."""
        os.fsync(self._file.fileno())

    def mark(self) -> dict[str, Any]:
        """Where it stands."""
        return {"bytes": self._end, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _kept(path: Path, mark: dict[str, Any] | None, step: int, evaluated: int) -> bytes:
    """What of the file at `path` stays; the rest is cut off or, where it is not what was written, left out."""
    there = path.read_bytes() if path.exists() else b""
    end = mark["bytes"] if mark else 0
    if mark is None or hashlib.sha256(there[:end]).hexdigest() == mark["sha256"]:
        if len(there) > end:
            os.truncate(path, end)
        return there[:end]
    found = ((_row(line, step, evaluated), line) for line in there.splitlines(keepends=True))
    lines = list({row: line for row, line in found if row}.values())
    log.warning(
        "%s is not what this run wrote: %d lines of it are kept, the others are lost; the weights are not affected",
        path,
        len(lines),
    )
    with atomic(path, "wb") as handle:
        handle.writelines(lines)
    return b"".join(lines)


def _row(line: bytes, step: int, evaluated: int) -> tuple[int, bool] | None:
    """(step, is it an evaluation) of a whole line that stays."""
    try:
        row = json.loads(line)
        stays = line.endswith(b"\n") and 0 <= row["step"] < (evaluated if "eval" in row else step)
        return (row["step"], "eval" in row) if stays else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
