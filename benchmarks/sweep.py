"""A sweep is a set of cells; running it again runs what is missing."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgeted import code, trackers
from budgeted.errors import UserError
from budgeted.files import read_json
from budgeted.recipe import Recipe
from tasks import cli, devices, submission

log = logging.getLogger("budgeted")
TRIES = 3  # without a cell done in between


def run(words: Sequence[str], launcher: Any, batch: int | None) -> int:
    """Launch the cells that `words` describe and are not done. Returns the exit code: 0, 1 (some failed) or 2."""
    try:
        jobs = cli.expand(words)
        recipes = cli.recipes(jobs)
        _refuse_twins(jobs, recipes)
        mode = _mode(words)
        if mode != "train":
            return _show(mode, recipes)
        for recipe in recipes:
            trackers.require(recipe.cfg["tracker"])
        if _kind(launcher) == "slurm" and not shutil.which("srun"):
            raise UserError("hydra/launcher=slurm: there is no srun here; submit from a login node of the cluster")
        states = _states(recipes, _kind(launcher))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = Counter(states)
    log.info(
        "%d cell%s: %s", len(jobs), "s" * (len(jobs) != 1), ", ".join(f"{n} {s}" for s, n in sorted(counts.items()))
    )
    _say_of_done([recipe for recipe, state in zip(recipes, states, strict=True) if state == "done"])
    todo = [k for k, state in enumerate(states) if state not in ("done", "running", "queued")]
    if not todo:
        log.info("nothing to launch")
        return 0
    _launch([jobs[k] for k in todo], [recipes[k] for k in todo], launcher, batch)
    return _gather([recipes[k] for k in todo])


def _states(recipes: Sequence[Recipe], kind: str) -> list[str]:
    """The state of every cell; `queued` where SLURM will run it, or has just begun to. Raises UserError."""
    from benchmarks import queue

    waiting = queue.read(recipes[0].cell.out)
    if waiting is None:
        unknown = "squeue does not answer: which of these cells wait in SLURM's queue already is not known"
        if kind == "slurm":
            raise UserError(f"{unknown}; try again once it does")
        log.warning(unknown)
    states = [r.cell.state for r in recipes]
    if waiting is None or not waiting.jobs:
        return states
    return [
        "queued" if waiting.job_of(r.cell.name, state, _said(r, "job")) else state
        for state, r in zip(states, recipes, strict=True)
    ]


def _said(recipe: Recipe, key: str) -> Any:
    """What the cell's state.json holds under `key`."""
    return (read_json(recipe.cell.directory / "state.json") or {}).get(key)


def _say_of_done(done: Sequence[Recipe]) -> None:
    """That they were made by other code, or where their data were, if that may matter."""
    here = code.digest(code.files())
    parts = [(recipe.cell.result() or {}).get("parts") or [] for recipe in done]
    others = sum(not made or any(part.get("code") != here for part in made) for made in parts)
    if others and done[0].cfg["code"] != "ignore":
        log.warning("%d of the done cells were made by other code than this; another out= makes them anew", others)
    roots = Counter(filter(None, (recipe.other_root() for recipe in done)))
    for root, count in roots.most_common(3):
        log.warning(
            "%d of the done cells had their data in %s; if those are other data, give another out=", count, root
        )


def _refuse_twins(jobs: Sequence[tuple[str, ...]], recipes: Sequence[Recipe]) -> None:
    """Two cells that differ only in what is no part of a cell (a path, a worker count) would share a directory."""
    seen: dict[Path, tuple[str, ...]] = {}
    for job, recipe in zip(jobs, recipes, strict=True):
        twin = seen.setdefault(recipe.cell.directory, job)
        if twin is not job:
            differ = ", ".join(sorted({w.split("=", 1)[0] for w in set(job) ^ set(twin)}))
            raise UserError(f"{recipe.cell.name} would be run twice: {differ} is no part of a cell; give another out=")


def _mode(words: Sequence[str]) -> str:
    return next((str(o.value()) for o in reversed(cli.parse(words)) if o.key_or_group == "mode"), "train")


def _show(mode: str, recipes: list[Recipe]) -> int:
    from benchmarks import plan, status

    if mode == "plan":
        plan.show(recipes)
    elif mode == "status":
        directories, out = [r.cell.directory for r in recipes], recipes[0].cell.out
        status.show(lambda: status.rows_of(directories, out), recipes[0].cfg["watch"])
    else:
        raise UserError(f"mode={mode}: takes one cell at a time: leave out -m")
    return 0


def _launch(jobs: Sequence[tuple[str, ...]], recipes: Sequence[Recipe], launcher: Any, batch: int | None) -> None:
    """Hand the cells to the launcher, `batch` at a time, and come back when none of them runs any more."""
    folder, kind, out = submission.record(jobs, recipes, launcher), _kind(launcher), recipes[0].cell.out
    size = batch or _at_once(kind, recipes)
    if kind in ("joblib", "local"):
        devices.share_threads(launcher.joblib["n_jobs"] if kind == "joblib" else min(size, len(jobs)))
        devices.share_gpus()
    if kind == "slurm":
        log.info("logs: %s; watch it: python run.py mode=status watch=5 out=%s", folder, shlex.quote(str(out)))
    todo, tries = list(range(len(jobs))), TRIES
    while todo and tries:
        whole = all([_launched(todo[k : k + size], jobs, recipes, launcher) for k in range(0, len(todo), size)])
        left = [k for k in todo if recipes[k].cell.state in ("missing", "partial")]
        # One killed worker of joblib's takes the others with it; SLURM's jobs may have been cancelled on purpose.
        if whole or kind != "joblib":
            return
        tries = TRIES if len(left) < len(todo) else tries - 1
        todo = left


def _at_once(kind: str, recipes: Sequence[Recipe]) -> int:
    """How many cells the launcher is handed at once: it starts all of them, or queues them as one array."""
    from benchmarks import queue

    if kind == "local":
        return devices.cells_at_once(recipes[0].cfg["device"])
    return queue.largest_array() if kind == "slurm" else len(recipes)


def _kind(launcher: Any) -> str:
    return "joblib" if hasattr(launcher, "joblib") else getattr(launcher, "_EXECUTOR", "")


def _launched(todo: Sequence[int], jobs: Sequence[tuple[str, ...]], recipes: Sequence[Recipe], launcher: Any) -> bool:
    """Did the launcher see these cells to their end?"""
    try:
        launcher.launch([list(jobs[k]) for k in todo], initial_job_idx=todo[0])
        return True
    except Exception as error:  # launchers raise what they like when a worker dies; the disk knows what is done
        log.error("the launcher gave up: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
        _wait_for({recipes[k].cell.name for k in todo}, recipes[0].cell.out)
        return False


def _wait_for(cells: set[str], out: Path) -> None:
    """A launcher that gives up on one cell leaves the others in SLURM's queue."""
    from benchmarks import queue

    while (known := queue.read(out)) is None or cells & set(known.jobs):
        time.sleep(5)


def _gather(recipes: list[Recipe]) -> int:
    """What became of the cells that were launched, as the disk says: launchers do not always know."""
    states = [r.cell.state for r in recipes]
    unfinished = [r for r, state in zip(recipes, states, strict=True) if state not in ("done", "running")]
    log.info("%d of %d cells done", states.count("done"), len(recipes))
    for recipe in unfinished:
        why = _said(recipe, "error")
        log.error("%s: %s%s", recipe.cell.name, recipe.cell.state, f": {why}" if why else "")
    if unfinished:
        log.error(
            "the same command tries these %d again; run.log in their folders, such as %s, says more",
            len(unfinished),
            unfinished[0].cell.directory,
        )
    return 1 if unfinished else 0
