"""Sharing one machine between the cells of a sweep: a GPU for each, or a share of the cores. Imports no torch."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

log = logging.getLogger("budgeted")
SHARED = "BUDGETED_GPUS"  # the GPUs of a sweep's driver, for jobs from which a launcher hides them
_held: IO | None = None  # the lock of this process's GPU, for as long as the process lives


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name them."""
    given = os.environ.get(SHARED, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if given is not None:
        return [g for g in given.split(",") if g]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def cells_at_once(device: str = "auto") -> int:
    """As many as there are GPUs; on a CPU as many as there are cores."""
    return (len(gpus()) if device != "cpu" else 0) or cores()


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))


def share_gpus() -> None:
    """Let the processes started from here claim any GPU that this one may use."""
    os.environ[SHARED] = ",".join(gpus())


def share_threads(jobs: int) -> None:
    """Let each of so many processes started from here use its share of the cores, or less where that was asked for."""
    share = max(1, cores() // (jobs if jobs > 0 else cores()))  # joblib's -1 is as many as there are cores
    asked = os.environ.get("OMP_NUM_THREADS", "")
    os.environ["OMP_NUM_THREADS"] = str(min(share, int(asked)) if asked.isdigit() and int(asked) else share)


def claim_gpu(folder: Path | None = None) -> str | None:
    """Take a GPU that no other process has, waiting for one; it stays this process's until that ends.

    To be called before torch is imported. None where there is no GPU.
    """
    global _held
    if _held is not None:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    known, told = gpus(), False
    while known:
        for name in known:
            handle = _locked((folder or Path(tempfile.gettempdir())) / f"budgeted-gpu-{name}.lock")
            if handle:
                _held, os.environ["CUDA_VISIBLE_DEVICES"] = handle, name
                return name
        if not told:
            log.info("all %d GPUs are in use; waiting for one", len(known))
            told = True
        time.sleep(1)
    return None


def _locked(path: Path) -> IO | None:
    """The file, held; None when another process holds it. Any user may: the machine is shared."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except PermissionError:  # Linux lets nobody create what is there in /tmp and another's
        descriptor = os.open(path, os.O_RDONLY)
    handle = os.fdopen(descriptor)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle
