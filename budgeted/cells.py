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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from budgeted.files import read_json, write_json

RESULT_SCHEMA = 1


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
        found = read_json(self.directory / "result.json")
        if not found or found.get("schema") != RESULT_SCHEMA or found.get("status") != "done":
            return None
        reported = found.get("reported")
        if found.get("signature") != self.signature or not isinstance(reported, dict):
            return None
        return found if isinstance(reported.get("value"), int | float) else None

    @property
    def state(self) -> str:
        """done, running, partial, failed, or missing. A run whose process is gone counts as partial."""
        if self.result():
            return "done"
        state = (read_json(self.directory / "state.json") or {}).get("state")
        if state in ("running", "done"):
            return "running" if state == "running" and self.holder() else "partial"
        return state if state in ("partial", "failed") else "missing"

    def write_state(self, state: str, step: int = 0, total: int | None = None, error: str | None = None, **more: Any):
        """Record `state` (running, partial, done, failed) at `step` of `total`."""
        fields = {"state": state, "step": step, "total": total, "error": error, **_whoami(), **more}
        write_json(self.directory / "state.json", {**fields, "updated": now()})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this cell. Raises Held when another process does; a dead process's lock is free at once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # A record lock ends with its process and is not inherited by data workers that outlive a killed parent.
        handle = open(self.directory / "lock", "a+")  # noqa: SIM115
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Held(f"{self.name} is being run by {self.holder() or 'another process'}") from None
            handle.truncate(0)
            handle.write(json.dumps({**_whoami(), "since": now()}))
            handle.flush()
            yield
        finally:
            handle.close()

    def holder(self) -> str | None:
        """Who holds the lock, in words, or None. Not to be asked by the process that holds it."""
        try:
            with open(self.directory / "lock", "r+") as handle:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except OSError:
                    who = json.loads(handle.read() or "{}")
        except (OSError, ValueError):
            return None
        return f"process {who.get('pid', '?')} on {who.get('host', '?')} since {who.get('since', '?')}"


def signature(fields: dict[str, Any]) -> str:
    """Six hex digits over `fields`, whatever the order of their keys."""
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _whoami() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
