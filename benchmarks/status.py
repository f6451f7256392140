"""python run.py mode=status: the state of every cell under a directory, as plain rows and as a terminal table."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import queue
from benchmarks.results import (
    BadFile,
    Cell,
    Entry,
    cell_of,
    clean,
    elsewhere_text,
    last_step,
    scan,
    seconds_text,
    written,
)

if TYPE_CHECKING:
    from rich.console import Group

log = logging.getLogger("budgeted")
Row = dict[str, Any]
STATES = ("failed", "died", "unreadable", "running", "queued", "missing", "partial", "done")
COLOURS = {
    "failed": "bold red",
    "died": "red",
    "unreadable": "red",
    "running": "cyan",
    "queued": "blue",
    "missing": "dim",
    "partial": "yellow",
    "done": "green",
}
SHOWN = 200  # unfinished cells shown one by one
FOLD = 40  # with more finished cells than this, they are shown as one line per task and schedule


def rows(out: Path) -> list[Row]:
    """A row per run directory under `out`: task, schedule, budget, seed, suffix, state, step, total, rate, eta, ...

    rate: samples per second; eta: seconds; value: the reported metric as a fraction; unknown ones are None.
    elsewhere: deeper than a cell of `out` lies, a run of another `out`.
    `died` is a run whose state says running though its process on this host, or its job in SLURM, is gone. `queued`
    ones have a job in SLURM that waits or has only begun; there may be nothing of them on disk yet.
    """
    out = Path(out)
    known = queue.read(out)  # before the disk: what ends in between is seen as done
    if known is None:
        log.warning("squeue does not answer: what waits in SLURM's queue is not shown")
        known = queue.Queue({}, frozenset())
    found = [_row(entry) for entry in scan(out)]
    for row in found:
        _look_up(row, known, out)
    there = {str(row["path"]) for row in found}
    return found + [
        _row(Entry(out / name, cell, "queued", progress={"job": job.id}, note=_why(job)))
        for name, job in known.jobs.items()
        for cell in _cells_of(out / name)
        if str(out / name) not in there
    ]


def rows_of(directories: Sequence[Path], out: Path) -> list[Row]:
    """The rows of these cells, in their order; `missing` where there is nothing yet."""
    found = {str(row["path"]): row for row in rows(out)}
    return [
        found.get(str(path)) or _row(Entry(path, cell, "missing")) for path in directories for cell in _cells_of(path)
    ]


def show(read: Callable[[], Sequence[Row]], watch: float | None) -> None:
    """Print the table of what `read` gives, again every `watch` seconds, until Ctrl-C, where that is given."""
    from rich.live import Live

    from benchmarks import console

    if not watch:
        console().print(render(read()))
        return
    with suppress(KeyboardInterrupt), Live(render(read()), refresh_per_second=4) as live:
        while True:
            time.sleep(watch)
            live.update(render(read()))


def _look_up(row: Row, known: queue.Queue, out: Path) -> None:
    """Correct a state by what SLURM says of the cell's job."""
    name = str(row["path"].relative_to(out))
    job = known.jobs.get(name)
    if coming := known.job_of(name, row["state"], row["job"]):
        row |= {"state": "queued", "job": coming.id, "note": _why(coming)}
    elif row["state"] == "running" and row["job"] in known.submitted and not (job and job.id == row["job"]):
        row |= {"state": "died", "note": f"job {row['job']} is gone"}


def _why(job: queue.Job) -> str:
    return f"job {job.id} {job.reason if job.waits else 'begins'}"


def _cells_of(path: Path) -> list[Cell]:
    """The cell that a directory names, if it names one."""
    try:
        return [cell_of(path)]
    except BadFile:
        return []


def _row(entry: Entry) -> Row:
    cell, result, progress = entry.cell, entry.result, entry.progress
    row: Row = {
        "task": cell.task, "schedule": cell.schedule, "budget": cell.budget, "suffix": cell.suffix,
        "seed": cell.seed if cell.seed >= 0 else None, "state": entry.state, "path": entry.path, "note": entry.note,
        "elsewhere": entry.elsewhere,
        "step": progress.get("step"), "total": progress.get("total"), "progress": progress.get("progress"),
        "rate": progress.get("samples_per_second"), "eta": progress.get("eta_seconds"), "job": progress.get("job"),
        "metric": None, "value": None,
    }  # fmt: skip
    if result:
        row |= {"step": result["iterations_done"], "total": result["iterations_done"], "progress": 1.0}
        row |= {
            "rate": result["samples_per_second"],
            "metric": result["reported.metric"],
            "value": result["reported.value"],
        }
    elif entry.state in ("running", "died") and (step := last_step(entry.path / "metrics.jsonl")) is not None:
        row["step"] = max(row["step"] or 0, step + 1)
        saved, total = progress.get("step"), row["total"]
        if row["eta"] and saved is not None and total and total > saved:  # as of the last checkpoint
            row["eta"] *= max(0, total - row["step"]) / (total - saved)
    if row["step"] is not None and row["total"]:
        row["progress"] = min(1.0, row["step"] / row["total"])
    return row


def render(found: Sequence[Row]) -> Group:
    """A summary line, the unfinished cells (worst first), the finished ones (folded where they are many).

    Runs of another `out` are not among them, as in the report: one line says where they are."""
    from rich.console import Group
    from rich.text import Text

    deeper = [row["path"] for row in found if row["elsewhere"]]
    found = [row for row in found if not row["elsewhere"]]
    counts = Counter(row["state"] for row in found)
    head = Text()
    for state in reversed(STATES):
        if counts[state]:
            head.append(f"{counts[state]:,} {state}   ", style=COLOURS[state])
    if not found:
        head.append("no runs yet; start with: python run.py -m sweep=smoke")
    unfinished = sorted((r for r in found if r["state"] != "done"), key=lambda r: STATES.index(r["state"]))
    finished = [r for r in found if r["state"] == "done"]
    parts: list[Any] = [head]
    if unfinished:
        parts.append(_cells(unfinished[:SHOWN]))
    if len(unfinished) > SHOWN:
        parts.append(Text(f"and {len(unfinished) - SHOWN:,} more unfinished", style="dim"))
    if finished:
        parts.append(_cells(finished) if len(finished) <= FOLD else _folded(finished))
    if deeper:
        parts.append(Text(elsewhere_text(deeper), style="dim"))
    return Group(*parts)


def _table(*columns: str, right: Sequence[str] = ()) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False, title_justify="left")
    for name in columns:
        table.add_column(
            name, justify="right" if name in right else "left", overflow="fold" if name == "" else "ellipsis"
        )
    return table


def _cells(found: Sequence[Row]) -> Any:
    from rich.text import Text

    right = ("seed", "step", "samples/s", "left")
    table = _table(
        "task", "schedule", "budget", "seed", "state", "", "step", "samples/s", "left", "result or reason", right=right
    )
    for r in found:
        seed = "?" if r["seed"] is None else f"{r['seed']}" + (f"-{r['suffix']}" if r["suffix"] else "")
        names = [Text(clean(r[key], 40)) for key in ("task", "schedule", "budget")]
        state = Text(r["state"], style=COLOURS[r["state"]])
        rate = "" if r["rate"] is None else f"{r['rate']:,.1f}"
        left = seconds_text(r["eta"]) if r["state"] == "running" else ""
        table.add_row(*names, seed, state, _bar(r), _steps(r), rate, left, _outcome(r))
    return table


def _bar(row: Row, width: int = 12) -> Any:
    from rich.text import Text

    if row["progress"] is None:
        return Text("")
    full = round(width * min(1.0, row["progress"]))
    return Text("━" * full, style=COLOURS[row["state"]]).append("─" * (width - full), style="bright_black")


def _steps(row: Row) -> str:
    if row["step"] is None:
        return ""
    if row["state"] == "done" or not row["total"]:
        return f"{row['step']:,}"
    return f"{row['step']:,} of {row['total']:,}"


def _outcome(row: Row) -> Any:
    from rich.text import Text

    if row["state"] == "done":
        return Text(f"{row['metric']} {100 * row['value']:.2f}%")
    job = f"job {row['job']}" if row["job"] and row["state"] == "running" else ""
    return Text(clean(row["note"] or job, 120))


def _folded(found: Sequence[Row]) -> Any:
    """A line per task and schedule (per task where that is too many): how many runs are finished at each budget."""
    from rich.text import Text

    by_schedule = len({(r["task"], r["schedule"]) for r in found}) <= FOLD
    groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    schedules: dict[str, set[str]] = defaultdict(set)
    for r in found:
        schedules[r["task"]].add(r["schedule"])
        groups[r["task"], r["schedule"] if by_schedule else ""][r["budget"]] += 1
    table = _table("task", "schedule", "done", "runs finished at each budget", right=("done",))
    for (task, schedule), budgets in groups.items():
        spread = "  ".join(
            f"{clean(b, 20)} \u00d7{n}" for b, n in sorted(budgets.items(), key=lambda b: written(b[0])[::-1])
        )
        name = clean(schedule, 40) if by_schedule else f"{len(schedules[task])} of them"
        table.add_row(Text(clean(task, 40)), Text(name), f"{sum(budgets.values()):,}", Text(spread))
    return table
