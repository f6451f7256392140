"""A cell: a resolved recipe with a name, a directory and a state.

    runs/<task>/<schedule>/<budget>/s<seed>[-<6 hex>]/

The suffix is there only where the recipe departs from the named one. Done, partial, failed and running are read
off the directory alone, so a sweep can be stopped anywhere and told to go on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from budgeted.errors import UserError
from budgeted.files import finite, read_json, write_json

RESULT_SCHEMA = 1
_HELD: set[Path] = set()  # the locks of this process


class Held(Exception):
    """Another process is running this cell; the message says who."""


@dataclass(frozen=True)
class Cell:
    """Who a run is and where it lives. `signature`: 6 hex digits over all that affects the result."""

    task: str
    schedule: str
    budget: str
    seed: int
    signature: str
    departs: bool
    out: Path

    @property
    def name(self) -> str:
        suffix = f"-{self.signature}" if self.departs else ""
        return f"{self.task}/{self.schedule}/{self.budget}/s{self.seed}{suffix}"

    @property
    def directory(self) -> Path:
        return self.out / self.name

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    def result(self) -> dict | None:
        """The result, when it is whole and of this very recipe."""
        found = self._whole_result()
        return found if found and found.get("signature") == self.signature else None

    def refuse_other_result(self) -> None:
        """Raise UserError where the directory holds the result of another recipe, which a run would write over."""
        found = self._whole_result()
        if found and found.get("signature") != self.signature:
            data = found.get("data")
            samples = data.get("n_train") if isinstance(data, dict) else "?"
            raise UserError(
                f"{self.directory} holds the result of another recipe or of other data (signature "
                f"{found.get('signature')} on {samples} training samples, now {self.signature}): "
                "move it away, or give another out="
            )

    def _whole_result(self) -> dict | None:
        found = read_json(self.directory / "result.json")
        if not found or not undamaged(found):
            return None
        if found.get("schema") != RESULT_SCHEMA or found.get("status") != "done":
            return None
        reported = found.get("reported")
        if not isinstance(reported, dict):
            return None
        value = reported.get("value")
        return found if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def state(self) -> str:
        """done, running, partial, failed, or missing. A run whose process is gone counts as partial."""
        if self.result():
            return "done"
        state = (read_json(self.directory / "state.json") or {}).get("state")
        if state in ("running", "done"):
            return "running" if state == "running" and self.holder() else "partial"
        return state if state in ("partial", "failed") else "missing"

    def write_result(self, result: dict[str, Any]) -> None:
        """Record the result, with a digest: a damaged one must not count as done."""
        whole = finite(result)
        write_json(self.directory / "result.json", {**whole, "digest": digest(whole)})

    def write_state(self, state: str, step: int = 0, total: int | None = None, error: str | None = None, **more: Any):
        """Record `state` (running, partial, done, failed) at `step` of `total`."""
        fields = {"state": state, "step": step, "total": total, "error": error, **_whoami(), **more, "updated": now()}
        path = self.directory / "state.json"
        try:
            write_json(path, fields)
        except OSError:
            if not path.exists():
                raise
            with open(path, "r+") as handle:  # a full disk has no room for a second file, but this one has its block
                json.dump(finite(fields), handle)
                handle.truncate()

    def begin(self) -> None:
        """Record that it is running, from the step on that a try before got to: whatever became of that is over."""
        old = read_json(self.directory / "state.json") or {}
        step, total = (v if type(v) is int and v >= 0 else None for v in (old.get("step"), old.get("total")))
        self.write_state("running", step or 0, total)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this cell. Raises Held when another process does; a dead process's lock is free at once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # A record lock ends with its process and is not inherited by data workers that outlive a killed parent.
        path = (self.directory / "lock").resolve()
        if path in _HELD:
            raise Held(f"{self.name} is being run by {self.holder()}")
        handle = open(path, "a+")  # noqa: SIM115
        try:
            if not _locked(handle):
                raise Held(f"{self.name} is being run by {self.holder() or 'another process'}")
            _HELD.add(path)
            handle.truncate(0)
            handle.write(json.dumps({**_whoami(), "since": now()}))
            handle.flush()
            for left in self.directory.glob("*.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield
        finally:
            _HELD.discard(path)
            handle.close()

    def holder(self) -> str | None:
        """Who holds the lock, in words, or None."""
        path = (self.directory / "lock").resolve()
        if path in _HELD:  # closing any handle of a file gives up this process's record lock on it
            return "this process"
        try:
            with open(path, "r+") as handle:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except (BlockingIOError, PermissionError):
                    who = read_json(path) or {}
        except OSError:
            return None
        return f"process {who.get('pid', '?')} on {who.get('host', '?')} since {who.get('since', '?')}"


def _locked(handle: IO) -> bool:
    """Lock a file for this process, if nobody else keeps it: who only asks for a holder has it for an instant."""
    for pause in (0.02, 0.1, 0.2, 0.0):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            time.sleep(pause)
    return False


def signature(fields: dict[str, Any]) -> str:
    """Six hex digits over `fields`, whatever the order of their keys, and with 0 the same as 0.0."""
    text = json.dumps(_floats(fields), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _floats(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(v) for v in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and abs(value) < 2**53 else value


def undamaged(result: dict[str, Any]) -> bool:
    """Take the digest out of a result that was read; is it that of the rest?"""
    try:
        return result.pop("digest", None) == digest(result)
    except RecursionError:
        return False


def digest(result: dict[str, Any]) -> str:
    """SHA-256 over a result's keys and values, without the digest itself."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _whoami() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": _job()}


def _job() -> str | None:
    """SLURM's number of this job, `<array>_<index>` in an array: what squeue and scancel go by."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")
