"""What a set of cells would cost: iterations, epochs, hours and disk, before anything is launched."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from budgeted.budgets import Budget
from budgeted.files import read_json
from budgeted.recipe import Recipe

MOST_ROWS = 60
Row = dict[str, Any]


def price(recipes: Sequence[Recipe]) -> list[Row]:
    """One row per cell, with what it is and what is left of it; None: not known.

    iterations and epochs are of the whole cell, `left` the iterations still to be made. `training` and `evaluating`
    are the seconds of one device still to be spent, `seconds` their sum (of what is known of them, if training is).
    `bytes`: what the run's directory will hold.
    """
    prices = _prices(recipes[0].cell.out) if recipes else {}
    found = ((r, prices.get((r.cell.task, r.work), Price())) for r in recipes)
    return [_row(_counted(recipe, price), price) for recipe, price in found]


def _counted(recipe: Recipe, found: Price) -> Recipe:
    """With T, where a budget is of FLOPs and a probe has counted those of a sample."""
    if recipe.total is not None or recipe.seconds or not found.flop:
        return recipe
    cost = found.flop * recipe.epoch.batch
    return replace(recipe, total=Budget(recipe.cell.budget).iterations(flop_per_iteration=cost))


def _row(recipe: Recipe, found: Price) -> Row:
    given, state, total = recipe.cfg["plan"]["samples_per_second"], recipe.cell.state, recipe.total
    rate, made = given or found.rate, _made(recipe, state)
    training = 0.0 if state == "done" else _training(recipe, rate, made)
    count = 0 if state == "done" else _evaluations(recipe, rate, made)
    evaluating = count * (found.evaluation or 0.0) if count == 0 or (count and found.evaluation) else None
    measured = (training is not None and not given and recipe.seconds is None) or evaluating is not None
    return {
        "cell": recipe.cell.name,
        "task": recipe.cell.task,
        "state": state,
        "unit": "by the clock" if recipe.seconds else "by FLOPs" if total is None else "iterations",
        "iterations": total,
        "left": None if total is None else total - made.step,
        "epochs": float(total / recipe.epoch.iterations) if total is not None and _is_counted(recipe) else None,
        "training": training,
        "evaluating": evaluating,
        "seconds": None if training is None else training + (evaluating or 0.0),
        "bytes": found.bytes,
        "device": found.device if measured else "",
        "given": given if training is not None and recipe.seconds is None else None,
        "data": _data(recipe),
    }


class Made(NamedTuple):
    """From where a run would go on: iterations made, and the share of a clock budget that is spent."""

    step: int = 0
    progress: float = 0.0


def _made(recipe: Recipe, state: str) -> Made:
    total = recipe.total or 0
    if state == "done":
        return Made(total, 1.0)
    if state not in ("running", "partial") or not recipe.cell.checkpoint.exists():
        return Made()
    saved = read_json(recipe.cell.directory / "state.json") or {}
    step, progress = _positive(saved.get("step")), _positive(saved.get("progress"))
    return Made(min(int(step or 0), total), min(progress or 0.0, 1.0))


def _training(recipe: Recipe, rate: float | None, made: Made) -> float | None:
    """Seconds of one device to the end."""
    if recipe.seconds:
        return recipe.seconds * (1 - made.progress)
    if recipe.total is None or rate is None:
        return None
    return (recipe.epoch.seen(recipe.total) - recipe.epoch.seen(made.step)) / rate


def _evaluations(recipe: Recipe, rate: float | None, made: Made) -> int | None:
    """How many are still to be made: for each period that ends, and at the end. None: the length is not known."""
    total, step, every = recipe.total, made.step, recipe.cfg["task"]["eval_every"]
    if recipe.seconds and (rate or every.endswith("%")):
        # For a share of the run any length will do.
        total = max(1, round(recipe.seconds * rate / recipe.epoch.batch)) if rate else 10**6
        step = int(made.progress * total)
    if total is None:
        return None
    over = recipe.period(every, total)
    ends, before, now = (over(k, k / total) for k in (total, total - 1, step))
    # A run that is not done has its last evaluation before it, whatever it has saved.
    return max(1, min(total - step, ends - now) + (ends == before))


def _is_counted(recipe: Recipe) -> bool:
    """Is the size of the data set known? Where it is not, tasks.cli makes one batch of it."""
    return recipe.data.root.is_dir() or recipe.data.n_train != recipe.epoch.batch


def _data(recipe: Recipe) -> str:
    if recipe.data.root.is_dir():
        return "present"
    return "made on first use" if recipe.cell.task.endswith("_tiny") else f"not in {recipe.data.root}"


# -- known prices -------------------------------------------------------------------------------------------


class Price(NamedTuple):
    """Of one device: samples per second, seconds of an evaluation; bytes of a run's directory; training FLOPs of a
    sample; which device. None: not measured.
    """

    rate: float | None = None
    evaluation: float | None = None
    bytes: float | None = None
    flop: float | None = None
    device: str = ""


def _prices(out: Path) -> dict[tuple[str, str], Price]:
    """(task, Recipe.work) to the medians of the runs and probes that are there."""
    found: dict[tuple[str, str], list[Price]] = {}
    for path in [*out.glob("*/*/*/*/result.json"), *out.glob("probe/*.json")]:
        result = read_json(path) or {}
        rate, work = _positive(result.get("samples_per_second")), result.get("work")
        if rate is None or not isinstance(work, str):
            continue
        size = _size(path.parent) if path.name == "result.json" else _positive(result.get("checkpoint_bytes"))
        devices = _positive(result.get("world_size")) or 1
        spent, count = _positive(result.get("eval_seconds")), _positive(result.get("evaluations"))
        evaluation = spent / count * devices if spent and count else None
        flop = _positive(result.get("flop_per_sample"))
        price = Price(rate / devices, evaluation, size, flop, str(result.get("device")))
        found.setdefault((str(result.get("task")), work), []).append(price)
    return {key: _median(prices) for key, prices in found.items()}


def _positive(value: Any) -> float | None:
    return (
        value if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf") else None
    )


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _median(prices: Sequence[Price]) -> Price:
    rate, evaluation, size, flop = (_middle(values) for values in list(zip(*prices, strict=True))[:4])
    return Price(rate, evaluation, size, flop, ", ".join(sorted({p.device for p in prices})))


def _middle(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


# -- what is printed ----------------------------------------------------------------------------------------


def show(recipes: Sequence[Recipe]) -> None:
    """Print the cells, a line per task where there are several, the total, and where the prices come from."""
    from benchmarks import console

    rows, output = price(recipes), console()
    output.print(_cells(rows))
    if len(rows) > MOST_ROWS or len({r["task"] for r in rows}) > 1:
        output.print(_tasks(rows))
    output.print(_total(rows))


def _table(title: str, *columns: str) -> Any:
    """A table whose columns are of numbers but for those that are named in words."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        words = name in ("cell", "state", "data", "task")
        table.add_column(name, justify="left" if words else "right", no_wrap=name in ("cell", "task"))
    return table


def _cells(rows: Sequence[Row]) -> Any:
    table = _table(
        f"{len(rows)} cell{'s' * (len(rows) != 1)}",
        "cell",
        "state",
        "iterations",
        "epochs",
        "device-hours left",
        "data",
    )
    for row in rows[:MOST_ROWS]:
        size = row["unit"] if row["iterations"] is None else f"{row['iterations']:,}"
        table.add_row(row["cell"], row["state"], size, _digits(row["epochs"]), _hours(row["seconds"]), row["data"])
    if len(rows) > MOST_ROWS:
        table.add_row(f"... and {len(rows) - MOST_ROWS} more", "", "", "", "", "")
    return table


_FORMS = {
    "iterations": "{:,.0f}",
    "epochs": "{:,.2f}",
    "hours": "{:,.3f}",
    "evaluation": "{:,.3f}",
    "gigabytes": "{:,.2f}",
}


def _tasks(rows: Sequence[Row]) -> Any:
    """One line per task of what is left; a number that does not cover all of its cells says how many it covers."""
    columns = ("task", "cells", "done", "iterations", "epochs", "device-hours", "of it evaluation", "GB on disk")
    table = _table("left, by task", *columns)
    for name, own in subtotals(rows).items():
        numbers = (_covering(own[key], own["cells"] - own["done"], form) for key, form in _FORMS.items())
        table.add_row(name, f"{own['cells']:,}", f"{own['done']:,}", *numbers)
    return table


def subtotals(rows: Sequence[Row]) -> dict[str, Row]:
    """By task: cells, how many are done, and of the rest (sum, number of cells that it covers) of each quantity.

    `hours` and, of them, `evaluation` are device-hours.
    """
    tasks: dict[str, Row] = {}
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        left = [r for r in own if r["state"] != "done"]
        tasks[task] = {
            "cells": len(own),
            "done": len(own) - len(left),
            "iterations": _sum(r["left"] for r in left),
            "epochs": _sum(_epochs_left(r) for r in left),
            "hours": _sum(_over(r["seconds"], 3600) for r in left),
            "evaluation": _sum(_over(r["evaluating"], 3600) for r in left),
            "gigabytes": _sum(_over(r["bytes"], 1e9) for r in left),
        }
    return tasks


def _epochs_left(row: Row) -> float | None:
    return None if row["epochs"] is None else row["epochs"] * row["left"] / row["iterations"]


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _sum(values: Any) -> tuple[float, int]:
    known = [v for v in values if v is not None]
    return sum(known), len(known)


def _covering(found: tuple[float, int], cells: int, form: str) -> str:
    value, covered = found
    if not covered:
        return ""
    return form.format(value) + (f" ({covered} cells)" if covered < cells else "")


def _total(rows: Sequence[Row]) -> str:
    left = [r for r in rows if r["state"] != "done"]
    sizes = [f"{sum(r['left'] or 0 for r in left):,} iterations"]
    sizes += [f"{n} {unit}" for unit in ("by the clock", "by FLOPs") if (n := sum(r["unit"] == unit for r in left))]
    return "; ".join(
        [
            f"{len(rows) - len(left)} done, {len(left)} to run: {', '.join([*sizes, *_spent(left)])}",
            *_not_priced(left),
            *_on_disk(left),
        ]
    )


def _spent(left: Sequence[Row]) -> list[str]:
    """Device-hours, what of them is evaluation, and whose pace that is."""
    training, evaluating = ([r[k] for r in left if r[k] is not None] for k in ("training", "evaluating"))
    if not training:
        return []
    paces = [f"the given {rate:g} samples/s" for rate in sorted({r["given"] for r in left if r["given"]})]
    tasks = len({r["task"] for r in left if r["given"]})
    paces[-1:] = [f"{paces[-1]} for all {tasks} tasks"] if paces and tasks > 1 else paces[-1:]
    devices = sorted({r["device"] for r in left if r["device"]})
    paces += [f"the pace of {', '.join(devices)}"] if devices else []
    hours = f"{_short(sum(r['seconds'] for r in left if r['seconds'] is not None) / 3600)} device-hours"
    hours += f", {_short(sum(evaluating) / 3600)} of them evaluation" if evaluating else " of training"
    return [hours + (f" (at {' and '.join(paces)})" if paces else "")]


def _not_priced(left: Sequence[Row]) -> list[str]:
    """What the device-hours leave out, and what would price it."""
    flops = sum(r["unit"] == "by FLOPs" for r in left)
    training = sum(r["training"] is None for r in left) - flops
    evaluating = sum(r["evaluating"] is None and r["training"] is not None for r in left)
    lines = []
    if flops:
        lines.append(f"{flops} not priced: their iterations are counted when they start, or by mode=probe")
    if training:
        lines.append(f"{training} not priced: no throughput known (mode=probe or plan.samples_per_second= gives it)")
    if evaluating:
        lines.append(f"evaluation not priced for {evaluating} (a finished run or mode=probe plan.evaluate=true does)")
    return lines


def _on_disk(left: Sequence[Row]) -> list[str]:
    sizes = [r["bytes"] for r in left if r["bytes"]]
    some = f" for {len(sizes)} of them" if len(sizes) < len(left) else ""
    return [f"about {_short(sum(sizes) / 1e9)} GB on disk{some}"] if sizes else []


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _short(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:,.3f}"
