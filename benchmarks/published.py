"""Numbers other people published, read from published.csv, and when they may stand beside ours."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("published.csv")


class Published(NamedTuple):
    """A published cell. mean and std are fractions for accuracies, std is None where none was printed."""

    mean: float
    std: float | None
    source: str


class Recipe(NamedTuple):
    """Which published recipe a task of ours reproduces."""

    task: str  # name in published.csv
    model: str
    source: str  # prefix of the sources that used this recipe
    tag: str  # short name shown in a table
    note: str = ""
    clips: int = 0  # with fewer training clips, or an unknown number, no published number may stand beside


# Our own bound, to tell Kinetics-400 from a small part of it: clips vanish, and no two copies have the same count.
KINETICS_CLIPS = 100_000
BUDGETED = "Li, Yumer, Ramanan"
REX = "Chen, Wolfe, Kyrillidis"
RECIPES = {
    "imagenet": Recipe("imagenet", "resnet18", BUDGETED, "paper"),
    "coco": Recipe("coco", "mask_rcnn_r50_fpn", BUDGETED, "paper"),
    "cityscapes": Recipe("cityscapes", "pspnet_r50", BUDGETED, "paper"),
    "kinetics": Recipe("kinetics", "i3d_r50", BUDGETED, "paper", clips=KINETICS_CLIPS),
    "cifar10": Recipe("cifar10", "resnet18", BUDGETED, "paper", "Table 2 of the paper: not published in text found."),
    "cifar10_resnet20": Recipe(
        "cifar10",
        "resnet20",
        REX,
        "REX",
        "Two differences to REX: it tuned the learning rate for every cell, ours is fixed; it reports the error on the "
        "test set, ours is scored on 5,000 held-out training images, with 45,000 left to train on.",
    ),
}

OTHER_CURVE = {(REX, "exp")}  # e^{-3p}, where schedule=exp is .97^(300 p) at its defaults (FOLLOWUPS.md)


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, ...], Published]:
    """(task, model, optimizer, schedule, budget, metric) -> Published; `error` is stored as top1 = 1 - error."""
    table: dict[tuple[str, ...], Published] = {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            mean, std = float(row["mean"]), float(row["std"]) if row["std"] else None
            metric = row["metric"]
            if metric == "error":
                metric, mean = "top1", round(1.0 - mean, 10)
            key = (row["task"], row["model"], row["optimizer"], row["schedule"], row["budget"], metric)
            table.setdefault(key, Published(mean, std, row["source"]))
    return table


def published(task: str, model: str, optimizer: str, schedule: str, budget: str, metric: str) -> Published | None:
    """The published (mean, std, source) of exactly this cell, named as in published.csv, or None."""
    return _table().get((task, model, optimizer, schedule, budget, metric))


def beside(
    task: str, optimizer: str, schedule: str, budget: str, metric: str, n_train: int | None = None
) -> Published | None:
    """What may stand beside an unaltered run of our task: only numbers of the recipe that the task reproduces.

    n_train: training samples of ours, as result.json says; asked of tasks whose data have no fixed size.
    """
    recipe = RECIPES.get(task)
    if recipe is None or (recipe.source, schedule) in OTHER_CURVE or (n_train or 0) < recipe.clips:
        return None
    found = published(recipe.task, recipe.model, optimizer, schedule, budget, metric)
    return found if found and found.source.startswith(recipe.source) else None


def notes(task: str, clips: Sequence[int | None], missing: int | None) -> list[str]:
    """What to know where published numbers stand beside unaltered runs of a task, or why they do not.

    clips: training samples of each run, None where unknown; missing: the most that any lacked.
    """
    recipe = RECIPES.get(task)
    if recipe is None:
        return []
    lines = [recipe.note] if recipe.note else []
    if not recipe.clips or not clips:
        return lines
    known = sorted({n for n in clips if n is not None})
    count = f"{known[0]:,}" + (f" to {known[-1]:,}" if len(known) > 1 else "") if known else "an unknown number of"
    lines.append(f"Ours: {count} training clips, {'an unknown number' if missing is None else f'{missing:,}'} missing.")
    if any((n or 0) < recipe.clips for n in clips):
        lines.append(
            f"No published number stands beside runs that do not say {recipe.clips:,} training clips or more: our own "
            "bound, to tell Kinetics-400 from a small part of it."
        )
    return lines
