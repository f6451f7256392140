"""Checkpoints: written atomically, checked by a digest, the last two kept, loaded without running code."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    """What a checkpoint holds, as it stood when it was packed: a tree for JSON, and all tensors' bytes in one (CPU).

    A thousand small tensors would be pickled one by one, by Python, while training waits for the interpreter.
    """

    tree: Any
    tensors: torch.Tensor

    def written(self) -> dict[str, Any]:
        """The content of the file: the tree as text, and the SHA-256 of all of it."""
        text = json.dumps(self.tree)
        return {"schema": SCHEMA, "digest": _digest(text, self.tensors), "text": text, "tensors": self.tensors}


def _digest(text: str, tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    digest.update(tensors.numpy())
    return digest.hexdigest()


def pack(content: Any, room: torch.Tensor | None = None) -> Packed:
    """Copy `content`: tensors, numbers, strings, None, and lists, tuples and dicts of these. Raises TypeError.

    `room` are the tensors of a packed content of the past, to be overwritten: fresh memory costs more than the copy.
    """
    pieces: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            here = value.detach() if value.is_cpu else value.detach().cpu()
            flat = here.reshape(-1).view(torch.uint8)
            pieces.append(flat)
            return {"t": (_name(value.dtype), value.shape, _kept(value.shape, value.stride()), flat.shape[0])}
        if isinstance(value, dict):
            if odd := [k for k in value if not isinstance(k, _KEYS)]:
                raise TypeError(f"{odd[0]!r} is no key that a checkpoint can hold")
            made: dict[str, Any] = {"d": [(k, v if type(v) in _LEAVES else plain(v)) for k, v in value.items()]}
            versions = getattr(value, "_metadata", None)  # of a module's state dict
            return made if versions is None else {**made, "m": plain(versions)}
        if isinstance(value, list | tuple):
            return {"l" if isinstance(value, list) else "u": [v if type(v) in _LEAVES else plain(v) for v in value]}
        if not isinstance(value, _KEYS):
            raise TypeError(f"{type(value).__name__} is nothing that a checkpoint can hold")
        return value

    tree = plain(content)
    if not pieces:
        return Packed(tree, torch.empty(0, dtype=torch.uint8))
    fits = room is not None and len(room) == sum(map(len, pieces))
    return Packed(tree, torch.cat(pieces, out=room if fits else None))


# Training waits while a checkpoint is packed: what is the same for each is worked out once.
_LEAVES, _KEYS = frozenset({int, float, str, bool, type(None)}), (str, int, float, type(None))


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=1 << 14)
def _kept(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides that a copy is to have, None in row-major order. Where elements share memory, empty_like's own."""
    if stride == _strides(shape):
        return None
    return torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()


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
            if length < 0 or end > len(packed.tensors) or (stride and 1 + _last(shape, stride) > max(1, whole.numel())):
                raise ValueError(f"{value} is no tensor of this file")
            return torch.empty_strided(shape, stride, dtype=whole.dtype).copy_(whole) if stride else whole
        if "d" not in value:
            return [made(v) for v in value["l"]] if "l" in value else tuple(made(v) for v in value["u"])
        found: dict[Any, Any] = OrderedDict() if "m" in value else {}
        found.update((k, made(v)) for k, v in value["d"])
        if "m" in value:
            found._metadata = made(value["m"])  # type: ignore[attr-defined]
        return found

    return made(packed.tree)


@functools.lru_cache(maxsize=1 << 14)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor in row-major order."""
    return tuple(math.prod(max(1, n) for n in shape[k + 1 :]) for k in range(len(shape)))


def _last(shape: list[int], stride: list[int]) -> int:
    """The offset of a tensor's last element."""
    return sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0


def opened(loaded: Any) -> Any:
    """What torch.load gave, unpacked where the file is one of these checkpoints."""
    ours = isinstance(loaded, dict) and loaded.get("schema") == SCHEMA and "tensors" in loaded
    return unpack(Packed(json.loads(loaded["text"]), loaded["tensors"])) if ours else loaded


def save(path: Path, content: dict[str, Any] | Packed) -> None:
    """Write `content` (see `pack`) to `path`; the checkpoint before it becomes *.prev.pt."""
    whole = (content if isinstance(content, Packed) else pack(content)).written()
    with atomic(path, "wb") as handle:
        try:
            with _without_crc():
                torch.save(whole, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, of which torch says "unexpected pos 768 vs 662"
                raise error.__context__ from None
            raise
        handle.flush()
        os.fsync(handle.fileno())  # all of it is there: only now may the one before the last go
        if path.exists():
            _keep(path)


@contextmanager
def _without_crc() -> Iterator[None]:
    """The digest is the check: the zip's own, which torch.load ignores, holds up training for as long as a save."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class Background:
    """Work that is done in a thread while training goes on, one piece at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._work: Future | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, once what was begun before is done. Raises what that raised."""
        self.wait()
        self._work = self._thread.submit(work)

    def join(self) -> None:
        """Wait until nothing is being done."""
        if self._work is not None:
            futures.wait([self._work])

    def wait(self) -> None:
        """Wait until nothing is being done. Raises what it raised, once."""
        self.join()
        self.check()

    def check(self) -> None:
        """Raise what was raised, once, without waiting."""
        if self._work is not None and self._work.done():
            work, self._work = self._work, None
            work.result()


def load(path: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU, or None when there is none. A broken one is named in the log.

    Raises BrokenCheckpoint when there are checkpoints but none of them is whole.
    """
    path, broken = Path(path), []
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


def weights(path: str | Path) -> dict[str, Any]:
    """The state dict that a finished run was evaluated with (its `weights_sha256` is of that), or what another trains.

    They differ where the evaluated ones are averages, or have batch-norm statistics of their own.

    Raises FileNotFoundError, or BrokenCheckpoint.
    """
    content = load(path)
    if content is None:
        raise FileNotFoundError(path)
    return content.get("evaluated", content["model"])


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
        if whole["digest"] != _digest(whole["text"], whole["tensors"]):
            raise BrokenCheckpoint("its digest does not match its content")
        content = opened(whole)
        if not isinstance(content, dict):
            raise BrokenCheckpoint("it holds no dict")
    except BrokenCheckpoint:
        raise
    except Exception as error:  # hostile bytes make torch raise anything, from EOFError to zip and pickle errors
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BrokenCheckpoint(f"{type(error).__name__}: {reason}") from error
    return content
