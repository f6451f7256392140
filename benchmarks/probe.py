"""Measure what one cell's work costs on this machine: a few iterations in a scratch directory, kept as one number."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgeted.files import write_json
from budgeted.recipe import Recipe

log = logging.getLogger("budgeted")
ITERATIONS = 12


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train a few iterations of `recipe` and leave `<out>/probe/<task>-<model>-<precision>.json` for mode=plan."""
    from tasks.base import train

    with tempfile.TemporaryDirectory() as scratch:
        cell = replace(recipe.cell, out=Path(scratch))
        result = train(replace(recipe, cell=cell, total=ITERATIONS, seconds=None))
    assert result is not None
    keep = ("task", "model", "precision", "device", "samples_per_second", "peak_memory_bytes")
    found = {k: result[k] for k in (*keep, "data_wait_seconds", "train_seconds")}
    target = recipe.cell.out / "probe"
    target.mkdir(parents=True, exist_ok=True)
    name = f"{recipe.cell.task}-{recipe.cfg['task']['model']}-{recipe.cfg['precision']}".replace("/", "_")
    write_json(target / f"{name}.json", found)
    rate, waiting = found["samples_per_second"], found["data_wait_seconds"] / found["train_seconds"]
    full = recipe.epoch.seen(recipe.full) / rate / 3600
    log.info(
        "%s on %s: %.1f samples/s, %.0f%% of the time waiting for data, peak memory %.2f GB; full run %.2f hours",
        recipe.cell.task,
        found["device"],
        rate,
        100 * waiting,
        found["peak_memory_bytes"] / 1e9,
        full,
    )
    return found
