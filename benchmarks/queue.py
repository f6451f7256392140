"""Cells that wait in SLURM's queue: what was submitted, as <out>/.sweep says, beside what squeue still knows."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from budgeted.files import read_json
from tasks.submission import FOLDER

PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")


@dataclass(frozen=True)
class Job:
    """A job of SLURM's. id: `7`, or `7_3` in an array; reason: SLURM's own word for why it waits."""

    id: str
    state: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in PENDING


@dataclass(frozen=True)
class Queue:
    """`jobs`: by the name of their cell, those that are not over. `submitted`: every job's number there ever was."""

    jobs: dict[str, Job]
    submitted: frozenset[str]

    def job_of(self, cell: str, state: str, wrote: str | None) -> Job | None:
        """The job that will go on with a cell whose state `wrote` (a job's number) has written; None if none will."""
        job = self.jobs.get(cell)
        if job is None or state == "done" or job.waits:
            return None if state == "done" else job
        # It runs: it has said so, or is yet to, or has recorded a failure and is ending.
        ending = state == "failed" and job.id == wrote
        return None if state == "running" or ending else job


def read(out: Path) -> Queue | None:
    """The queue of all sweeps under `out`, empty where none went to SLURM; None where squeue does not answer.

    Calls squeue once.
    """
    submitted: dict[str, str] = {}  # job to cell, the newest sweep last
    folders = sorted((out / FOLDER).glob("*")) if shutil.which("squeue") else []
    for folder in folders:
        submitted.update(zip(_jobs(folder), _cells(folder), strict=False))
    alive = _squeue({job.split("_")[0] for job in submitted}) if submitted else {}
    if alive is None:
        return None
    return Queue({cell: alive[job] for job, cell in submitted.items() if job in alive}, frozenset(submitted))


def _cells(folder: Path) -> tuple[str, ...]:
    """The cells of one submission to SLURM, in the order of its jobs."""
    path = folder / "cells.json"
    return _read_cells(path) if path.exists() else ()


@functools.cache
def _read_cells(path: Path) -> tuple[str, ...]:
    """Written once, before the jobs are."""
    found = read_json(path) or {}
    if found.get("launcher") != "SlurmLauncher":
        return ()
    return tuple(str(c["cell"]) for c in found.get("cells", []) if isinstance(c, dict) and "cell" in c)


def _jobs(folder: Path) -> list[str]:
    """The jobs of one submission in their order, from the files that submitit keeps for each."""
    if not _cells(folder):
        return []
    found = (path.name.removesuffix("_submitted.pkl") for path in folder.glob("*_submitted.pkl"))
    numbers = (name.split("_") for name in found)
    return ["_".join(n) for n in sorted((n for n in numbers if all(map(str.isdigit, n))), key=lambda n: [*map(int, n)])]


def _squeue(numbers: Collection[str]) -> dict[str, Job] | None:
    """What squeue says of these jobs and of all in their arrays; None when it cannot be asked."""
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join(sorted(numbers))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # it fails where it has forgotten them all
        return None
    fields = (line.split("|", 2) for line in done.stdout.splitlines())
    return {f[0]: Job(*f) for f in fields if len(f) == 3 and f[1] != "COMPLETING"}


@functools.cache
def largest_array() -> int:
    """The most jobs that SLURM takes in one array, 1001 unless the cluster says otherwise."""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 1001
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return int(found[1]) if found else 1001
