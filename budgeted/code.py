"""Which code this is: its commit, what was changed since, and a digest of every file that a result depends on."""

from __future__ import annotations

import difflib
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
PARTS = ("run.py", "budgeted/**/*.py", "tasks/**/*.py", "conf/**/*.yaml")
MOST_NAMED = 5
FOLDERS = sorted({part.split("/")[0] for part in PARTS})


def git(*words: str) -> str | None:
    """What git says of this checkout; None where it is none, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=HOME, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """{commit, dirty}: None where it is no checkout. Dirty: something of PARTS is changed, or new."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *FOLDERS)
    return {"commit": commit.strip() if commit else None, "dirty": None if changes is None else bool(changes.strip())}


def diff() -> str | None:
    """How this checkout differs from its commit, with the files of PARTS that are new; None where it is no checkout."""
    changed, new = git("diff", "HEAD"), git("ls-files", "--others", "--exclude-standard", "-z", "--", *FOLDERS)
    if changed is None or new is None:
        return None
    texts = ((path, (HOME / path).read_text(errors="replace")) for path in new.split("\0") if path)
    added = (difflib.unified_diff([], t.splitlines(), "/dev/null", f"b/{path}", lineterm="") for path, t in texts)
    return changed + "".join(f"{line}\n" for lines in added for line in lines)


def digest(of: dict[str, str]) -> str:
    """12 hex digits that stand for such `files()`."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def changed(then: dict[str, str], here: dict[str, str]) -> str | None:
    """Which of two `files()` differ, the first few by name; None where none does."""
    paths = sorted(path for path in {*then, *here} if then.get(path) != here.get(path))
    rest = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return f"{', '.join(paths[:MOST_NAMED])}{rest} differ" if paths else None


def files() -> dict[str, str]:
    """Path below the checkout to the first 16 digits of its SHA-256, for code and configuration; sorted."""
    found = (path for part in PARTS for path in HOME.glob(part) if path.is_file())
    return {str(path.relative_to(HOME)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(found)}
