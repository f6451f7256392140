"""Checkpoints: written atomically, checked by a digest, the last two kept, loaded without running code."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from budgeted.files import atomic

log = logging.getLogger("budgeted")
SCHEMA = 1


class BrokenCheckpoint(Exception):
    """A checkpoint that does not load, or is not what was written."""


def tensors_sha256(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, strings, lists, dicts) to `path`; the one before it becomes *.prev.pt."""
    content = {"schema": SCHEMA, **content}
    content["digest"] = _digest(content)
    with atomic(path, "wb") as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, of which torch says "unexpected pos 768 vs 662"
                raise error.__context__ from None
            raise
        handle.flush()
        os.fsync(handle.fileno())  # all of it is there: only now may the one before the last go
        if path.exists():
            _keep(path)


def copied(content: Any) -> Any:
    """`content` as it stands now, its tensors on the CPU: what training changes from here on leaves it alone."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        same = copy.copy(content)  # a module's state dict carries its versions as an attribute
        same.update((k, copied(v)) for k, v in content.items())
        return same
    return type(content)(map(copied, content)) if isinstance(content, list | tuple) else content


class Background:
    """Work that is done in a thread while training goes on, one piece at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, once what was begun before is done. Raises what that raised."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until nothing is being done. Raises what it raised, once."""
        self.join()
        self.check()

    def check(self) -> None:
        """Raise what was raised, once, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def load(path: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU, or None when there is none. A broken one is named in the log.

    Raises BrokenCheckpoint when there are checkpoints but none of them is whole.
    """
    broken = []
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            content = _read(candidate)
        except BrokenCheckpoint as error:
            log.warning("%s is broken (%s): trying the one before", candidate, error)
            broken.append(candidate.name)
            continue
        if broken:  # out of the way, or the next save would put it in the place of the good one
            with suppress(FileNotFoundError):  # another rank was faster
                os.replace(path, path.with_name(f"{path.stem}.broken{path.suffix}"))
        return content
    if broken:
        raise BrokenCheckpoint(f"{path.parent}: no whole checkpoint ({', '.join(broken)} broken); remove to start over")
    return None


def _keep(path: Path) -> None:
    """Make the checkpoint at `path` the one before, leaving it where it is if the file system has hard links."""
    spare = previous(path).with_suffix(".tmp")
    with suppress(FileNotFoundError):
        spare.unlink()
    try:
        os.link(path, spare)
    except OSError:
        os.replace(path, previous(path))
    else:
        os.replace(spare, previous(path))
        spare.unlink(missing_ok=True)  # still there where the two were one file already: rename(2) then does nothing


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _read(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():  # torch warns of hostile bytes ahead of its error
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise BrokenCheckpoint("not a checkpoint of this version")
        if content.pop("digest", None) != _digest(content):
            raise BrokenCheckpoint("its digest does not match its content")
    except BrokenCheckpoint:
        raise
    except Exception as error:  # hostile bytes make torch raise anything, from EOFError to zip and pickle errors
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BrokenCheckpoint(f"{type(error).__name__}: {reason}") from error
    return content


def _digest(content: dict[str, Any]) -> str:
    tensors: list[tuple[str, torch.Tensor]] = []
    plain = hashlib.sha256()

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append((name, value))
        elif isinstance(value, dict):
            plain.update(f"{name}: dict of {len(value)}\n".encode())
            for k, v in value.items():
                walk(v, f"{name}/{type(k).__name__}:{k}")
        elif isinstance(value, list | tuple):
            plain.update(f"{name}: {type(value).__name__} of {len(value)}\n".encode())
            for k, v in enumerate(value):
                walk(v, f"{name}/{k}")
        else:
            plain.update(f"{name}={value!r}\n".encode())

    walk(content, "")
    return hashlib.sha256((tensors_sha256(tensors) + plain.hexdigest()).encode()).hexdigest()
