"""What a sweep was submitted with, in <out>/.sweep/<id>/: code.json, code.diff and cells.json beside the jobs' logs.

A job compares the code it starts from with that of its sweep, however long it has waited.
"""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from budgeted import code
from budgeted.cells import now
from budgeted.errors import UserError
from budgeted.files import atomic, read_json, write_json
from budgeted.recipe import Recipe

log = logging.getLogger("budgeted")
# Jobs inherit these: which sweep they belong to, and where its code is.
SWEEP, HOME = "BUDGETED_SWEEP", "BUDGETED_HOME"
FOLDER = ".sweep"


def begin() -> None:
    """Give this process's sweep a name, before Hydra composes the launcher that uses it, and its jobs a way to it."""
    os.environ[SWEEP] = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    os.environ[HOME] = str(code.HOME)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(code.HOME), *filter(None, path)]))


def leave() -> None:
    """A run that no sweep launched belongs to none, wherever it was started."""
    os.environ.pop(SWEEP, None)


def record(jobs: Sequence[Sequence[str]], recipes: Sequence[Recipe], launcher: Any) -> Path:
    """Write down the code and the recipes of the cells that are about to be launched, in their order."""
    folders = [out / FOLDER / os.environ[SWEEP] for out in dict.fromkeys(r.cell.out for r in recipes)]
    state, diff = {**code.git_state(), "files": code.files()}, code.diff()
    if diff is None:
        log.warning("this is no git checkout, or git does not answer: digests of the code are kept, but no diff")
    for folder in folders:  # a job looks under the `out` of its cell
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "code.json", state)
        with atomic(folder / "code.diff") as handle:
            handle.write(diff or "")
    folder = folders[0]
    cells = [
        {"cell": r.cell.name, "signature": r.cell.signature, "words": list(words), "recipe": {**r.fields, "T": r.total}}
        for words, r in zip(jobs, recipes, strict=True)
    ]
    write_json(
        folder / "cells.json",
        {
            "submitted": now(),
            "host": socket.gethostname(),
            "user": _user(),
            "command": sys.argv,
            "launcher": type(launcher).__name__,
            "resources": {k: str(v) for k, v in (getattr(launcher, "params", None) or {}).items()},
            "cells": cells,
        },
    )
    return folder


def difference(out: Path) -> str | None:
    """How the code here differs from that of the sweep this job belongs to, in words; None where it does not, or the
    job belongs to none."""
    name = os.environ.get(SWEEP)
    if not name:
        return None
    path = out / FOLDER / name / "code.json"
    submitted = read_json(path)
    if not submitted:
        return f"which code was submitted is not on record: {path} is absent or broken"
    changed = code.changed(submitted.get("files") or {}, code.files())
    if not changed:
        return None
    return f"this is not the code that was submitted ({_commit(submitted)}, now {_commit(code.git_state())}): {changed}"


def check(option: str, out: Path) -> str | None:
    """What to warn of, as `code=warn|stop|ignore` says. Raises UserError where it says stop."""
    found = None if option == "ignore" else difference(out)
    if found and option == "stop":
        raise UserError(f"{found}; code=warn runs it all the same, and the same sweep command submits this code")
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _commit(state: Mapping[str, Any]) -> str:
    commit = state.get("commit")
    return f"{commit[:10]}{' and changes' if state.get('dirty') else ''}" if commit else "no checkout"
