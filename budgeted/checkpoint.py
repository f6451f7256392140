"""Checkpoints: written atomically, checked by a digest, the last two kept, loaded without running code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from budgeted.files import atomic

log = logging.getLogger("budgeted")
SCHEMA = 2


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


class Packed(NamedTuple):
    """What a checkpoint holds, as it stood when it was packed: a text, and all tensors' bytes in one tensor (CPU).

    A thousand small tensors would be pickled one by one, by Python, while training waits for the interpreter.
    """

    text: str
    tensors: torch.Tensor

    @property
    def digest(self) -> str:
        """SHA-256 over all of it."""
        digest = hashlib.sha256(self.text.encode())
        digest.update(self.tensors.numpy())
        return digest.hexdigest()


def pack(content: Any) -> Packed:
    """Copy `content`: tensors, numbers, strings, None, and lists, tuples and dicts of these. Raises TypeError."""
    pieces: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            pieces.append(flat)
            shape, stride = list(value.shape), list(value.stride())
            if stride != _strides(shape):  # where elements share memory, empty_like gives strides of its own
                stride = list(torch.empty_like(value, device="meta").stride())
            return {"t": [str(value.dtype)[6:], shape, stride, len(flat)]}
        if isinstance(value, dict):
            if odd := [k for k in value if not isinstance(k, str | int | float | None)]:
                raise TypeError(f"{odd[0]!r} is no key that a checkpoint can hold")
            made: dict[str, Any] = {"d": [[k, plain(v)] for k, v in value.items()]}
            versions = getattr(value, "_metadata", None)  # of a module's state dict
            return made if versions is None else {**made, "m": plain(versions)}
        if isinstance(value, list | tuple):
            return {"l" if isinstance(value, list) else "u": [plain(v) for v in value]}
        return value

    text = json.dumps(plain(content))
    return Packed(text, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8))


def unpack(packed: Packed) -> Any:
    """What was packed, its tensors with the strides that they had. Raises anything where it was not."""
    end = 0

    def made(value: Any) -> Any:
        nonlocal end
        if not isinstance(value, dict):
            return value
        if "t" in value:
            dtype, shape, stride, length = value["t"]
            start, end = end, end + length
            whole = packed.tensors[start:end].clone().view(getattr(torch, dtype)).reshape(shape)
            if length < 0 or end > len(packed.tensors) or 1 + _last(shape, stride) > max(1, whole.numel()):
                raise ValueError(f"{value} is no tensor of this file")
            if stride != _strides(shape):
                whole = torch.empty_strided(shape, stride, dtype=whole.dtype).copy_(whole)
            return whole
        if "d" not in value:
            return [made(v) for v in value["l"]] if "l" in value else tuple(made(v) for v in value["u"])
        found: dict[Any, Any] = OrderedDict() if "m" in value else {}
        found.update((k, made(v)) for k, v in value["d"])
        if "m" in value:
            found._metadata = made(value["m"])  # type: ignore[attr-defined]
        return found

    return made(json.loads(packed.text))


def _strides(shape: list[int]) -> list[int]:
    """Of a tensor in row-major order."""
    return [math.prod(max(1, n) for n in shape[k + 1 :]) for k in range(len(shape))]


def _last(shape: list[int], stride: list[int]) -> int:
    """The offset of a tensor's last element."""
    return sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0


def opened(loaded: Any) -> Any:
    """What torch.load gave, unpacked where the file is one of these checkpoints."""
    ours = isinstance(loaded, dict) and loaded.get("schema") == SCHEMA and "tensors" in loaded
    return unpack(Packed(loaded["text"], loaded["tensors"])) if ours else loaded


def save(path: Path, content: dict[str, Any] | Packed) -> None:
    """Write `content` (see `pack`) to `path`; the checkpoint before it becomes *.prev.pt."""
    packed = content if isinstance(content, Packed) else pack(content)
    whole = {"schema": SCHEMA, "digest": packed.digest, **packed._asdict()}
    with atomic(path, "wb") as handle:
        try:
            torch.save(whole, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, of which torch says "unexpected pos 768 vs 662"
                raise error.__context__ from None
            raise
        handle.flush()
        os.fsync(handle.fileno())  # all of it is there: only now may the one before the last go
        if path.exists():
            _keep(path)


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
            whole = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
            raise BrokenCheckpoint("not a checkpoint of this version")
        packed = Packed(whole["text"], whole["tensors"])
        if whole["digest"] != packed.digest:
            raise BrokenCheckpoint("its digest does not match its content")
        content = unpack(packed)
        if not isinstance(content, dict):
            raise BrokenCheckpoint("it holds no dict")
    except BrokenCheckpoint:
        raise
    except Exception as error:  # hostile bytes make torch raise anything, from EOFError to zip and pickle errors
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BrokenCheckpoint(f"{type(error).__name__}: {reason}") from error
    return content
