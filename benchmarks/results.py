"""Reading run directories: which cells there are, in which state, and only those results that can be trusted."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from budgeted.cells import undamaged
from budgeted.errors import UserError

log = logging.getLogger("budgeted")
MAX_BYTES = 1 << 20  # a larger result.json or state.json is refused unread
FRACTIONS = frozenset({"top1", "top5", "box_ap", "mask_ap", "miou"})
STATES = ("running", "partial", "failed", "done")
AMOUNT = re.compile(r"\+?((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)\s*(%|it|ep|im|s|min|h|gpuh|flop)", re.IGNORECASE)
FAMILY = {
    "s": "clock",
    "min": "clock",
    "h": "clock",
    "gpuh": "gpuh",
    "flop": "flop",
}  # every other unit is a fraction of the full run
SWEEPS = ".sweep"  # tasks/submission.py writes <out>/.sweep/<id>/cells.json; importing it would take hydra along
MAX_SWEEP_BYTES, MAX_ASKED = 32 << 20, 100_000  # of one cells.json, some 2 KB a cell; cells over all of them
MOST_NAMED = 5  # sweeps beside a missing cell, directories to report apart
MAX_PARTS = 10_000  # stretches of one run
DEPTH = 4  # <task>/<schedule>/<budget>/s<seed> below `out`
SEED = re.compile(r"s(\d{1,9})(?:-([0-9a-f]{6}))?")


class BadFile(ValueError):
    """A file that must not count; the message says why in a few words."""


class Cell(NamedTuple):
    """What a run's directory says: runs/<task>/<schedule>/<budget>/s<seed>[-<suffix>]."""

    task: str
    schedule: str
    budget: str
    seed: int
    suffix: str  # "" for the named recipe, else six hex digits


@dataclass(slots=True)
class Entry:
    """One run directory. state: done running died partial failed unreadable, or missing where a sweep asked for it and
    there is nothing. result: the checked result.json."""

    path: Path
    cell: Cell
    state: str
    result: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)  # the checked state.json
    note: str = ""
    asked: dict[str, Any] | None = None  # what the sweep that asked for it recorded; unchecked, {} where not needed
    elsewhere: bool = False  # deeper than a cell of this `out` lies: another out's, or a copy; counts in no table


def clean(text: object, limit: int = 300) -> str:
    """Text safe to print or write as UTF-8: one line, no control, bidirectional or lone surrogate characters."""
    line = " ".join(str(text)[: 8 * limit].split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def amount(budget: str) -> tuple[str, float]:
    """(family, size) of an amount as written; the clock's in minutes. BadFile for anything else.

    5% -> ("fraction", .05), 45min -> ("clock", 45), 90s -> ("clock", 1.5), 3h -> ("clock", 180), 8gpuh -> ("gpuh", 8);
    it, ep and im -> ("fraction", NaN): only result.json knows their fraction.
    """
    size, unit = written(budget)
    if unit == "%":
        return "fraction", size / 100
    size *= {"h": 60, "s": 1 / 60}.get(unit, 1)
    return FAMILY.get(unit, "fraction"), size if unit in FAMILY else math.nan


def written(budget: str) -> tuple[float, str]:
    """(number, unit) of an amount as written, the unit in lower case. BadFile for anything else."""
    match = AMOUNT.fullmatch(budget)
    if not match:
        raise BadFile(f"budget {clean(budget, 40)!r} is not an amount")
    return float(match[1]), match[2].lower()


def seconds_text(seconds: float | None) -> str:
    """'42 s', '3 min 20 s', '5 h 07 min', '3 d 4 h'."""
    if seconds is None:
        return "—"
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 48 * 3600:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400:,} d {s % 86400 // 3600} h"


# ---- checking one file


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadFile(f"is {type(value).__name__}, not a number")
    if not abs(value) < 1e30:  # false for NaN, infinities and integers too large for a float
        raise BadFile("is not a finite number")
    return float(value)


def _positive(value: object) -> float:
    if (number := _number(value)) < 0:
        raise BadFile("is negative")
    return number


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadFile(f"is {type(value).__name__}, not an integer")
    if not 0 <= value < 10**18:
        raise BadFile("is out of range")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BadFile(f"is {type(value).__name__}, not text")
    if not 0 < len(value) <= 200 or not value.isprintable():
        raise BadFile("is empty, too long or unprintable text")
    return value


def _path(value: object) -> str:
    """A place on disk: shown, never opened, so one that cannot be shown as it is loses what is odd in it."""
    if not isinstance(value, str):
        raise BadFile(f"is {type(value).__name__}, not text")
    return clean(value, 4096)


def _parts(value: object) -> list[dict[str, Any]]:
    """The stretches of a run: {step, code, world_size, device}, None where not said."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PARTS:
        raise BadFile(f"is not a list of 1 to {MAX_PARTS}")
    if not all(isinstance(part, dict) for part in value):
        raise BadFile("holds what is no object")
    return [_flatten(part, {}, PART) for part in value]


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadFile(f"is {type(value).__name__}, not true or false")
    return value


Check = Callable[[object], Any]
REQUIRED: dict[str, Check] = {
    "schema": _count, "task": _text, "schedule": _text, "optimizer": _text, "seed": _count,
    "signature": _text, "status": _text, "iterations_done": _count,
    "budget.amount": _text, "reported.metric": _text, "reported.rule": _text, "reported.value": _number,
}  # fmt: skip
OPTIONAL: dict[str, Check] = {
    "budget.fraction": _positive, "budget.iterations": _count, "budget.full_iterations": _count,
    "samples_seen": _count, "train_seconds": _positive, "eval_seconds": _positive,
    "data_wait_seconds": _positive, "compile_seconds": _positive, "samples_per_second": _positive,
    "peak_memory_bytes": _count, "device": _text, "precision": _text, "world_size": _count, "resumed": _count,
    "data.name": _text, "data.n_train": _count, "data.n_val": _count, "data.missing": _count,
    "data.root": _path, "data.digest": _text, "data.classes": _count, "parts": _parts,
    "weights_sha256": _text, "git.commit": _text, "git.dirty": _flag,
    "model": _text, "skipped_updates": _count, "started": _text, "finished": _text,
}  # fmt: skip
PART: dict[str, Check] = {"step": _count, "code": _text, "world_size": _count, "device": _text}
PROGRESS: dict[str, Check] = {
    "step": _count, "total": _count, "host": _text, "pid": _count, "updated": _text,
    "samples_per_second": _positive, "eta_seconds": _positive, "progress": _positive,
}  # fmt: skip


def _refuse(constant: str) -> float:
    raise BadFile(f"holds {constant}")


def load(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a regular file of at most so many bytes. BadFile for all else, NaN and Infinity included."""
    try:
        status = path.stat()
        if not os.path.isfile(path) or status.st_size > most:
            raise BadFile("is not a small regular file")
        data = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise BadFile(clean(error.strerror)) from error
    except BadFile:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFile(f"is not JSON ({clean(error, 60)})") from error
    if not isinstance(data, dict):
        raise BadFile(f"holds a {type(data).__name__}, not an object")
    return data


def _look(data: dict[str, Any], key: str) -> object:
    """The value at a dotted key, None where a part is absent."""
    value: Any = data
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise BadFile("is not in an object")
        value = value.get(part)
    return value


def _flatten(data: dict[str, Any], required: dict[str, Check], optional: dict[str, Check]) -> dict[str, Any]:
    """Checked values under their dotted keys; optional ones are None where absent or null."""
    flat: dict[str, Any] = {}
    for key, check in (required | optional).items():
        try:
            value = _look(data, key)
            flat[key] = None if value is None and key in optional else check(value)
        except BadFile as error:
            raise BadFile(f"{key} {error}") from None
    return flat


def _metrics(data: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """name -> {final, best, best_step}; None where null or absent."""
    metrics = data.get("metrics")
    if not isinstance(metrics, dict) or not 0 < len(metrics) <= 64:
        raise BadFile("metrics is not an object of 1 to 64 names")
    checked = {}
    for name, values in metrics.items():
        if not isinstance(values, dict):
            raise BadFile(f"metrics.{clean(name, 40)} is not an object")
        number = _share if name in FRACTIONS else _number
        checks: dict[str, Check] = {"final": number, "best": number, "best_step": _count}
        try:
            checked[_text(name)] = _flatten(values, {}, checks)
        except BadFile as error:
            raise BadFile(f"metrics.{clean(name, 40)}: {error}") from None
    return checked


def _share(value: object) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise BadFile(f"{number:g} is not a fraction")
    return number


def check_result(data: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """A result.json as dotted keys plus `metrics`, `family` and `versions`; BadFile names the first thing wrong.

    It must be schema 1, done, agree with its own directory and with itself.
    """
    flat = _flatten(data, REQUIRED, OPTIONAL)
    flat["metrics"] = _metrics(data)
    versions = data.get("versions")
    flat["versions"] = (
        {clean(k, 40): clean(v, 40) for k, v in list(versions.items())[:40]} if isinstance(versions, dict) else {}
    )
    if flat["schema"] != 1 or flat["status"] != "done":
        raise BadFile(f"schema {flat['schema']}, status {flat['status']!r}: only schema 1 and 'done' count")
    named = Cell(flat["task"], flat["schedule"], flat["budget.amount"], flat["seed"], cell.suffix)
    if named != cell or cell.suffix not in ("", flat["signature"]):
        raise BadFile("describes another cell than its directory")
    metric, rule = flat["reported.metric"], flat["reported.rule"]
    if rule not in ("final", "best") or metric not in flat["metrics"]:
        raise BadFile("reported names no stored metric or rule")
    stored = flat["metrics"][metric][rule]
    if stored is None or abs(stored - flat["reported.value"]) > 1e-9:
        raise BadFile(f"reported.value disagrees with metrics.{clean(metric, 40)}.{rule}")
    _resolve_budget(flat)
    return flat


def _resolve_budget(flat: dict[str, Any]) -> None:
    """Sets `family`, and `budget.fraction` where only iterations or a percentage say it."""
    flat["family"], size = amount(flat["budget.amount"])
    if flat["family"] != "fraction":
        return
    if not flat["budget.fraction"]:
        iterations, full = flat["budget.iterations"], flat["budget.full_iterations"]
        flat["budget.fraction"] = iterations / full if iterations and full else size
    if not flat["budget.fraction"] > 0:
        raise BadFile("budget.fraction is unknown")


# ---- finding and classifying directories


def _walk(top: str, depth: int, seen: set[str]) -> Iterator[tuple[str, set[str]]]:
    """(directory, names in it) of every directory with a result.json or a state.json, never looking inside one."""
    try:
        with os.scandir(top) as found:
            entries = list(found)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if names & {"result.json", "state.json"}:
        yield top, names
        return
    for entry in sorted(entries, key=lambda e: e.name) if depth else ():
        if not entry.name.startswith(".") and _enter(entry, seen):
            yield from _walk(entry.path, depth - 1, seen)


def _enter(entry: os.DirEntry[str], seen: set[str]) -> bool:
    """Whether to descend: a directory, and if by a symbolic link not a second way to what is scanned anyway."""
    try:
        if not entry.is_dir():
            return False
        if not entry.is_symlink():
            return True
    except OSError:
        return False
    real = os.path.realpath(entry.path) + os.sep
    if any(real.startswith(other) or other.startswith(real) for other in seen):
        return False
    seen.add(real)
    return True


def cell_of(path: Path) -> Cell:
    """The cell that a directory names. BadFile if it is not <task>/<schedule>/<budget>/s<seed>[-hex6]."""
    match = SEED.fullmatch(path.name)
    if not match or len(path.parts) < 4:
        raise BadFile("is not in a <task>/<schedule>/<budget>/s<seed> directory")
    task, schedule, budget = (_text(part) for part in path.parts[-4:-1])
    return Cell(task, schedule, budget, int(match[1]), match[2] or "")


def scan(out: Path) -> list[Entry]:
    """Every run directory under `out`, in path order.

    A cell lies DEPTH below `out`. What lies deeper is `elsewhere`, a run of another `out` or a copy, and counts in no
    table whatever its state. Of two results at the same depth the second is unreadable.
    """
    out = Path(out)
    entries = [read(Path(found), names) for found, names in _walk(str(out), 8, {os.path.realpath(out) + os.sep})]
    done: dict[Cell, Entry] = {}
    deep = {id(entry): len(entry.path.relative_to(out).parts) for entry in entries}
    for entry in sorted(entries, key=lambda e: deep[id(e)]):
        entry.elsewhere = deep[id(entry)] > DEPTH
        if entry.state != "done":
            continue
        if entry.elsewhere:
            if (first := done.get(entry.cell)) and entry.result == first.result:
                entry.note = f"the same result as in {first.path}"
        elif (first := done.setdefault(entry.cell, entry)) is not entry:
            _discard(entry, f"a second result of the cell in {first.path}")
    return entries


def elsewhere_text(paths: Sequence[Path]) -> str:
    """What to do about run directories that lie deeper than cells of `out` do, "" for none."""
    if not paths:
        return ""
    outs = sorted(Counter(path.parents[DEPTH - 1] for path in paths).items())
    named = "; ".join(f"mode=report out={clean(out)} ({n:,})" for out, n in outs[:MOST_NAMED])
    more = f"; and {len(outs) - MOST_NAMED} directories more" if len(outs) > MOST_NAMED else ""
    runs = f"{len(paths):,} run{'s' if len(paths) != 1 else ''}"
    return f"Not counted here: {runs} of another out= deeper below, which have a report of their own: {named}{more}."


def asked(out: Path) -> tuple[dict[Cell, dict[str, Any]], dict[Cell, list[str]]]:
    """What the sweeps under `out` asked for, by cell, as their cells.json say: {words, recipe, ...}, unchecked; and
    the names of the sweeps that did.

    A sweep records the cells that it launched; those already done are not among them.
    """
    found: dict[Cell, dict[str, Any]] = {}
    sweeps: dict[Cell, list[str]] = {}
    for path in sorted((Path(out) / SWEEPS).glob("*/cells.json")):
        try:
            cells = load(path, MAX_SWEEP_BYTES).get("cells")
        except BadFile as error:
            log.warning("%s %s: what it asked for is not in the report", clean(path), error)
            continue
        for one in cells if isinstance(cells, list) else ():
            if (cell := _asked_cell(one)) and len(found) < MAX_ASKED:
                found[cell] = one
                sweeps.setdefault(cell, []).append(path.parent.name)
    return found, sweeps


def _asked_cell(record: object) -> Cell | None:
    """The cell of one record in a cells.json, None where it names none."""
    name = record.get("cell") if isinstance(record, dict) else None
    if not isinstance(name, str) or len(name) > 1000:
        return None
    path = Path(name)
    if len(path.parts) != DEPTH or path.is_absolute() or ".." in path.parts:
        return None
    try:
        cell = cell_of(path)
        amount(cell.budget)
    except BadFile:
        return None
    return cell


def with_missing(entries: list[Entry], out: Path) -> list[Entry]:
    """The entries, those that a sweep asked for marked, and one more for each that was asked for and is not there."""
    wanted, sweeps = asked(out)
    for entry in entries:
        if wanted.pop(entry.cell, None) is not None:
            entry.asked = {}
    names = ((cell, f"s{cell.seed}" + (f"-{cell.suffix}" if cell.suffix else "")) for cell in wanted)
    return entries + [
        Entry(
            Path(out) / cell.task / cell.schedule / cell.budget / name,
            cell,
            "missing",
            note=_who_asked(sweeps[cell]),
            asked=wanted[cell],
        )
        for cell, name in names
    ]


def _who_asked(sweeps: list[str]) -> str:
    """The files that keep a cell missing, as long as they are there."""
    files = [f"{SWEEPS}/{clean(name, 60)}/cells.json" for name in sweeps[:MOST_NAMED]]
    return ", ".join(files) + (f" and {len(sweeps) - MOST_NAMED} more" if len(sweeps) > MOST_NAMED else "")


def _discard(entry: Entry, why: str) -> None:
    entry.state, entry.result, entry.note = "unreadable", None, why


def read(path: Path, names: set[str] | None = None) -> Entry:
    """The entry of one run directory. names: the files in it, if known."""
    names = set(os.listdir(path)) if names is None else names
    task, schedule, budget = (clean(part, 120) for part in (("?",) * 3 + path.parts)[-4:-1])
    cell = Cell(task, schedule, budget, -1, "")
    broken = "state.json" if "result.json" not in names else "result.json"
    try:
        cell = cell_of(path)
        if "result.json" in names:
            data = load(path / "result.json")
            if not undamaged(data):
                raise BadFile("was damaged: its digest is not that of its content")
            return Entry(path, cell, "done", check_result(data, cell))
        return _unfinished(path, cell)
    except BadFile as error:
        return Entry(path, cell, "unreadable", note=f"{broken}: {error}")


def _unfinished(path: Path, cell: Cell) -> Entry:
    """The entry of a directory without result.json, from its state.json."""
    data = load(path / "state.json")
    state = data.get("state")
    if state not in STATES:
        raise BadFile(f"state {clean(state, 40)!r} is none of {', '.join(STATES)}")
    if state == "done":
        raise BadFile("says done, but there is no result.json")
    progress = _flatten(data, {}, PROGRESS)
    progress["job"] = None if data.get("job") is None else clean(data["job"], 40)
    note = "" if data.get("error") is None else clean(data["error"])
    if state == "running" and died(progress, path / "lock"):
        state, note = "died", f"process {progress['pid']} is gone"
    return Entry(path, cell, state, progress=progress, note=note)


def died(progress: dict[str, Any], lock: Path) -> bool:
    """Whether the process that wrote a `running` state on this host is gone, or its pid is another's by now."""
    if not progress["pid"] or progress["host"] != socket.gethostname():
        return False
    try:
        os.kill(progress["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    try:
        with open(lock, "r+") as handle:  # a run holds the record lock of its directory as long as it lives
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


# ---- metrics.jsonl


@dataclass(slots=True)
class Curve:
    """Logged steps of one run, thinned: progress in [0, 1], lr, loss (NaN where not logged); bad: lines skipped.

    rates: (progress, lr) of the whole schedule, where the run's configuration says it: few steps may have been logged.
    """

    progress: list[float]
    lr: list[float]
    loss: list[float]
    bad: int
    rates: tuple[list[float], list[float]] | None = None


def read_curve(path: Path, pieces: int = 160, piece: int = 1024) -> Curve:
    """Reads at most pieces x piece bytes of a metrics.jsonl, evenly spread, however long it is."""
    curve = Curve([], [], [], 0)
    for line in _sample_lines(path, pieces, piece):
        try:
            data = json.loads(line, parse_constant=_refuse)
            if not isinstance(data, dict):
                raise BadFile("not an object")
            if "eval" in data:
                continue
            progress, lr = _share(data.get("progress")), _number(data.get("lr"))
            loss = math.nan if data.get("loss") is None else _number(data["loss"])
        except (ValueError, RecursionError):
            curve.bad += 1
            continue
        curve.progress.append(progress)
        curve.lr.append(lr)
        curve.loss.append(loss)
    return curve


def exact_rates(directory: Path, points: int = 400) -> tuple[list[float], list[float]] | None:
    """(progress, learning rate) of a run's schedule by its formula; None where its files do not say all of it."""
    import yaml

    from budgeted.budgets import Epoch
    from budgeted.recipe import build_schedule

    try:
        cfg = yaml.safe_load((directory / "config.yaml").read_text())
        result = json.loads((directory / "result.json").read_text())
        epoch = Epoch(result["data"]["n_train"], cfg["task"]["batch_size"], cfg["task"]["last_batch"])
        schedule = build_schedule(cfg, result["budget"]["full_iterations"], epoch)
        own = cfg["optimizer"].get("lr")
        base = float(cfg["task"]["lr"] if own is None else own)
        total = min(points, int(result["budget"]["iterations"]))
        progress = [k / total for k in range(total)]
        rates = [base * schedule(p) for p in progress]
        return (progress, rates) if all(map(math.isfinite, rates)) else None
    except (OSError, UserError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _sample_lines(path: Path, pieces: int, piece: int) -> Iterator[bytes]:
    """Whole lines of a file: all of a short one, those in evenly spaced pieces of a long one."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= pieces * piece:
            file.seek(0)
            yield from file.read().splitlines()
            return
        for index in range(pieces):
            file.seek(index * (size - piece) // (pieces - 1))
            lines = file.read(piece).split(b"\n")
            yield from lines[(1 if index else 0) : -1]


def last_step(path: Path) -> int | None:
    """The step of the last whole line of a metrics.jsonl; reads 4 KiB."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return _count(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return None
