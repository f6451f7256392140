"""A sweep is a set of cells; running it again runs what is missing."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgeted.errors import UserError
from budgeted.files import read_json
from budgeted.recipe import Recipe
from tasks import cli

log = logging.getLogger("budgeted")


def run(words: Sequence[str], launcher: Any, batch: int | None) -> int:
    """Launch the cells that `words` describe and are not done. Returns the exit code: 0, 1 (some failed) or 2."""
    try:
        jobs = cli.expand(words)
        recipes = cli.recipes(jobs)
        _refuse_twins(jobs, recipes)
        mode = _mode(words)
        if mode != "train":
            return _show(mode, recipes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    states = [r.cell.state for r in recipes]
    counts = Counter(states)
    log.info("%d cells: %s", len(jobs), ", ".join(f"{n} {s}" for s, n in sorted(counts.items())))
    todo = [k for k, state in enumerate(states) if state not in ("done", "running")]
    if not todo:
        log.info("nothing to launch")
        return 0
    _launch([jobs[k] for k in todo], launcher, batch)
    return _gather([recipes[k] for k in todo])


def _refuse_twins(jobs: Sequence[tuple[str, ...]], recipes: Sequence[Recipe]) -> None:
    """Two cells that differ only in what is no part of a cell (a path, a worker count) would share a directory."""
    seen: dict[Path, tuple[str, ...]] = {}
    for job, recipe in zip(jobs, recipes, strict=True):
        twin = seen.setdefault(recipe.cell.directory, job)
        if twin is not job:
            differ = ", ".join(sorted({w.split("=", 1)[0] for w in set(job) ^ set(twin)}))
            raise UserError(f"{recipe.cell.name} would be run twice: {differ} is no part of a cell; give another out=")


def _mode(words: Sequence[str]) -> str:
    return next((w.split("=", 1)[1] for w in reversed(words) if w.startswith("mode=")), "train")


def _show(mode: str, recipes: list[Recipe]) -> int:
    from benchmarks import console, plan, status

    if mode == "plan":
        plan.show(recipes)
    elif mode == "status":
        console().print(status.render(status.rows_of([r.cell.directory for r in recipes], recipes[0].cell.out)))
    else:
        raise UserError(f"mode={mode}: takes one cell at a time: leave out -m")
    return 0


def _launch(jobs: list[tuple[str, ...]], launcher: Any, batch: int | None) -> None:
    size = batch or len(jobs)
    for start in range(0, len(jobs), size):
        try:
            launcher.launch([list(job) for job in jobs[start : start + size]], initial_job_idx=start)
        except Exception as error:  # launchers raise what they like when a worker dies; the disk knows what is done
            log.error("the launcher gave up: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])


def _gather(recipes: list[Recipe]) -> int:
    """What became of the cells that were launched, as the disk says: launchers do not always know."""
    unfinished = [r.cell for r in recipes if r.cell.state not in ("done", "running")]
    log.info("%d of %d cells done", len(recipes) - len(unfinished), len(recipes))
    for cell in unfinished:
        said = (read_json(cell.directory / "state.json") or {}).get("error")
        log.error("%s: %s%s", cell.name, cell.state, f": {said}" if said else "")
    if unfinished:
        log.error(
            "the same command tries these %d again; %s/*/run.log says more",
            len(unfinished),
            Path(recipes[0].cell.out),
        )
    return 1 if unfinished else 0
