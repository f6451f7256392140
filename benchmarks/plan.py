"""What a set of cells would cost: iterations, epochs, hours and disk, before anything is launched."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from budgeted.files import read_json
from budgeted.recipe import Recipe

MOST_ROWS = 60


def price(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """One row per cell: name, state, iterations, epochs, bytes on disk, and seconds of one device; None: not known."""
    speeds = _speeds(recipes[0].cell.out) if recipes else {}
    rows = []
    for r in recipes:
        given = r.cfg["plan"]["samples_per_second"]
        found = speeds.get((r.cell.task, r.cfg["task"]["model"], r.cfg["precision"], r.cell.departs), Speed())
        rate = given or found.rate
        samples = None if r.total is None else r.epoch.seen(r.total)
        counted = r.data.root.is_dir() or r.cfg["task"].get("samples") or r.cfg["task"]["full"].endswith("ep")
        rows.append(
            {
                "cell": r.cell.name,
                "state": r.cell.state,
                "iterations": r.total,
                "epochs": float(r.total / r.epoch.iterations) if r.total is not None and counted else None,
                "seconds": r.seconds if r.seconds else samples / rate if samples is not None and rate else None,
                "bytes": found.bytes,
                "device": "" if given or r.seconds else found.device,
                "data": _data(r),
            }
        )
    return rows


def show(recipes: Sequence[Recipe]) -> None:
    """Print the table, its total, and where the prices come from."""
    from rich.table import Table

    from benchmarks import console

    rows = price(recipes)
    table = Table(title=f"{len(rows)} cells", title_justify="left")
    for name, justify in (
        ("cell", "left"),
        ("state", "left"),
        ("iterations", "right"),
        ("epochs", "right"),
        ("device-hours", "right"),
        ("data", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name == "cell")  # type: ignore[arg-type]
    for row in rows[:MOST_ROWS]:
        table.add_row(
            row["cell"],
            row["state"],
            _or_clock(row["iterations"]),
            _digits(row["epochs"]),
            _hours(row["seconds"]),
            row["data"],
        )
    if len(rows) > MOST_ROWS:
        table.add_row(f"... and {len(rows) - MOST_ROWS} more", "", "", "", "", "")
    output = console()
    output.print(table)
    output.print(_total(rows))


def _data(recipe: Recipe) -> str:
    if recipe.data.root.is_dir():
        return "present"
    return "made on first use" if recipe.cell.task.endswith("_tiny") else f"not in {recipe.data.root}"


def _total(rows: list[dict[str, Any]]) -> str:
    left = [r for r in rows if r["state"] != "done"]
    priced = [r["seconds"] for r in left if r["seconds"] is not None]
    iterations = sum(r["iterations"] or 0 for r in left)
    line = f"{len(rows) - len(left)} done, {len(left)} to run: {iterations:,} iterations"
    if priced:
        devices = sorted({r["device"] for r in left if r["device"]})
        line += f", {sum(priced) / 3600:.2f} device-hours of training"
        line += f" (at the pace of {', '.join(devices)})" if devices else ""
    if len(priced) < len(left):
        unpriced = len(left) - len(priced)
        line += f"; {unpriced} not priced: no throughput known (mode=probe or plan.samples_per_second= gives it)"
    sizes = [r["bytes"] for r in left if r["bytes"]]
    return line + (f"; about {sum(sizes) / 1e9:.2f} GB on disk" if sizes else "")


class Speed(NamedTuple):
    """Samples per second of one device, bytes of a run's directory, and which device; None: not measured."""

    rate: float | None = None
    bytes: int | None = None
    device: str = ""


def _speeds(out: Path) -> dict[tuple[str, str, str, bool], Speed]:
    """(task, model, precision, is the recipe altered?) to the medians of the runs and probes that are there."""
    found: dict[tuple[str, str, str, bool], list[Speed]] = {}
    for path in [*out.glob("*/*/*/*/result.json"), *out.glob("probe/*.json")]:
        result = read_json(path) or {}
        rate, size = result.get("samples_per_second"), result.get("checkpoint_bytes")
        if not isinstance(rate, int | float) or rate <= 0:
            continue
        ours = path.name == "result.json"
        altered = "-" in path.parent.name if ours else bool(result.get("altered"))
        if ours:
            size = sum(f.stat().st_size for f in path.parent.iterdir() if f.is_file())
        key = (str(result.get("task")), str(result.get("model")), str(result.get("precision")), altered)
        world = result.get("world_size")
        per_device = rate / world if isinstance(world, int) and world > 0 else float(rate)
        found.setdefault(key, []).append(Speed(per_device, size, str(result.get("device"))))
    return {key: _median(speeds) for key, speeds in found.items()}


def _median(speeds: Sequence[Speed]) -> Speed:
    sizes = [s.bytes for s in speeds if s.bytes]
    return Speed(
        statistics.median(s.rate for s in speeds if s.rate),
        int(statistics.median(sizes)) if sizes else None,
        ", ".join(sorted({s.device for s in speeds})),
    )


def _or_clock(iterations: int | None) -> str:
    return "by the clock" if iterations is None else f"{iterations:,}"


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:,.3f}"
