"""Measure what one cell's work costs on this machine: a few iterations in a scratch directory, kept as one number."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgeted.distributed import World
from budgeted.files import write_json
from budgeted.recipe import Recipe
from budgeted.session import Session, device_name, peak_memory
from tasks import base

log = logging.getLogger("budgeted")
ITERATIONS = 12


class Pace(Session):
    """A session that is not evaluated: on COCO or Kinetics that takes far longer than these iterations."""

    def evaluate(self) -> None:
        self._owed = False


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train a few iterations of `recipe` and leave `<out>/probe/<task>-<model>-<precision>.json` for mode=plan."""
    cfg, world = recipe.cfg, World.from_environment()
    device = base.pick_device(cfg["device"], world)
    world.join(device)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            session = _train(recipe, Path(scratch), world, device)
            size = session.cell.checkpoint.stat().st_size if world.is_main else 0
    finally:
        world.leave()
    found = {
        "task": recipe.cell.task,
        "model": cfg["task"]["model"],
        "precision": cfg["precision"],
        "altered": recipe.cell.departs,
        "device": device_name(device),
        "world_size": world.size,
        "samples_per_second": session.samples / session.elapsed,
        "data_wait_seconds": session.wait_seconds,
        "train_seconds": session.elapsed,
        "peak_memory_bytes": peak_memory(device),
        "checkpoint_bytes": size,
    }
    if world.is_main:
        name = "-".join((found["task"], found["model"], found["precision"])).replace("/", "_")
        target = recipe.cell.out / "probe"
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / f"{name}.json", found)
        _say(found, recipe)
    return found


def _train(recipe: Recipe, scratch: Path, world: World, device: Any) -> Session:
    cfg = {**recipe.cfg, "checkpoint": {"every": "100%", "minutes": 1e9}}
    cell = replace(recipe.cell, out=scratch)
    cell.directory.mkdir(parents=True)
    adapter = base.adapter_of(cfg)(cfg, recipe.data, device)
    session = Pace(replace(recipe, cfg=cfg, cell=cell, total=ITERATIONS, seconds=None), ITERATIONS, world, device)
    try:
        adapter.build(session)
        adapter.train(session)
    finally:
        session.close()
    return session


def _say(found: dict[str, Any], recipe: Recipe) -> None:
    full = recipe.epoch.seen(recipe.full) / found["samples_per_second"] / 3600
    log.info(
        "%s on %d x %s: %.1f samples/s, %.0f%% of the time waiting for data, peak memory %.2f GB; full run %.2f hours",
        found["task"], found["world_size"], found["device"], found["samples_per_second"],
        100 * found["data_wait_seconds"] / found["train_seconds"], found["peak_memory_bytes"] / 1e9, full,
    )  # fmt: skip
