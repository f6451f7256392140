"""Which code this is: its commit, what was changed since, and a digest of every file that a result depends on."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
PARTS = ("run.py", "budgeted/**/*.py", "tasks/**/*.py", "conf/**/*.yaml")


def git(*words: str) -> str | None:
    """What git says of this checkout; None where it is none, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=HOME, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """{commit, dirty}: None where it is no checkout."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip() if commit else None, "dirty": None if changes is None else bool(changes.strip())}


def files() -> dict[str, str]:
    """Path below the checkout to the first 16 digits of its SHA-256, for code and configuration; sorted."""
    found = (path for part in PARTS for path in HOME.glob(part) if path.is_file())
    return {str(path.relative_to(HOME)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(found)}
