"""Measure what one cell's work costs on this machine: some iterations in a scratch directory, kept as one number."""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import seconds_text
from budgeted.distributed import World
from budgeted.errors import UserError
from budgeted.files import write_json
from budgeted.machine import device_name, peak_memory
from budgeted.recipe import Recipe
from budgeted.session import Session
from tasks import base

log = logging.getLogger("budgeted")


WARM = 2  # iterations that are not measured


def measured(workers: int) -> int:
    """Iterations to measure. Slow data come as many batches at a time as there are workers: five whole lots of them."""
    lot = max(1, workers)
    return 5 * lot * math.ceil(3 / lot)


class Pace(Session):
    """A session whose measured iterations start with nothing in hand; evaluated only where `plan.evaluate` asks for it.

    A loader gets two batches a worker ahead while the first steps are made, or whenever the machine stalls. Trained on,
    they would come at no wait, and slow data would look fast: they are thrown away, outside the clock.
    """

    def __init__(self, recipe: Recipe, world: World, device: torch.device) -> None:
        workers = recipe.cfg["data"]["workers"]
        self.spare, self.end = 2 * workers, WARM + measured(workers)
        total = self.end + self.spare
        super().__init__(replace(recipe, total=total, seconds=None), total, world, device)
        self.marks: list[tuple[int, float, float]] = []  # samples, seconds, of them waiting: before and after

    @property
    def finished(self) -> bool:
        return self.step >= self.end

    def _timed(self, source: Any) -> Iterator[Any]:
        batches = iter(source)
        while self.step < WARM:
            yield from super()._timed(itertools.islice(batches, len(self.pieces())))
        with self.clock.paused():
            for _ in range(self.spare - self.spare % len(self.pieces())):
                next(batches)
        yield from super()._timed(batches)

    def after_step(self, loss: torch.Tensor | float) -> None:
        marked = self.step + 1 in (WARM, self.end)
        if marked and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are only queued are not made yet
        super().after_step(loss)
        if marked:
            self.marks.append((self.samples, self.clock.elapsed, self.clock.wait_seconds))

    def pace(self) -> tuple[float, float]:
        """(samples per second, share of the time that was waiting for data)."""
        samples, seconds, waiting = (after - before for before, after in zip(*self.marks, strict=True))
        return samples / seconds, waiting / seconds

    def evaluate(self) -> None:
        if self.finished and self.cfg["plan"]["evaluate"]:
            super().evaluate()
        self._owed = False


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train some iterations of `recipe`; leaves `<out>/probe/<task>-<model>-<precision>-<work>.json` for mode=plan."""
    cfg, world = recipe.cfg, World.from_environment()
    device = base.pick_device(cfg["device"], world)
    world.join(device)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            session, flop = _train(recipe, Path(scratch), world, device)
            size = session.cell.checkpoint.stat().st_size if world.is_main else 0
    finally:
        world.leave()
    pace, waiting = session.pace()
    found = {
        "task": recipe.cell.task,
        "model": cfg["task"]["model"],
        "precision": cfg["precision"],
        "work": recipe.work,
        "data": {"n_train": recipe.data.n_train, "n_val": recipe.data.n_val},
        "device": device_name(device),
        "world_size": world.size,
        "samples_per_second": pace,
        "data_wait_share": waiting,
        "eval_seconds": session.clock.eval_seconds,
        "evaluations": session.evaluations,
        "peak_memory_bytes": peak_memory(device),
        "checkpoint_bytes": size,
        "flop_per_sample": flop and flop / recipe.epoch.batch,
    }
    if world.is_main:
        name = "-".join((found["task"], found["model"], found["precision"], found["work"])).replace("/", "_")
        target = recipe.cell.out / "probe"
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / f"{name}.json", found)
        _say(found, recipe)
    return found


def _train(recipe: Recipe, scratch: Path, world: World, device: Any) -> tuple[Pace, int | None]:
    """The session of the iterations made, and the FLOPs of one; None where they cannot be counted."""
    cfg = {**recipe.cfg, "checkpoint": {"every": "100%", "minutes": 1e9}}
    cell = replace(recipe.cell, out=scratch)
    cell.directory.mkdir(parents=True)
    adapter = base.adapter_of(cfg)(cfg, recipe.data, device)
    try:
        flop = adapter.flops()
    except UserError as error:
        log.warning("a budget of FLOPs cannot be priced: %s", error)
        flop = None
    session = Pace(replace(recipe, cfg=cfg, cell=cell), world, device)
    try:
        adapter.build(session)
        adapter.train(session)
    finally:
        session.close()
    return session, flop


def _say(found: dict[str, Any], recipe: Recipe) -> None:
    full = recipe.epoch.seen(recipe.full) / found["samples_per_second"]
    looked = f"; an evaluation {found['eval_seconds']:.1f} s" if found["evaluations"] else ""
    log.info(
        "%s on %d x %s: %.1f samples/s, %.0f%% of the time waiting for data, peak memory %.2f GB; "
        "full run %s%s", found["task"], found["world_size"], found["device"], found["samples_per_second"],
        100 * found["data_wait_share"], found["peak_memory_bytes"] / 1e9, seconds_text(full), looked,
    )  # fmt: skip
