"""What run.py does, by `mode=`. Each takes the composed configuration and Hydra's choice of group options."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from budgeted.errors import UserError

log = logging.getLogger("budgeted")
Choices = Mapping[str, str]


def train(cfg: Any, choices: Choices) -> float | None:
    """Train one cell and return its reported value; None when another process is training it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from budgeted import trackers
    from tasks import cli, devices, submission

    alone = HydraConfig.get().mode == RunMode.RUN
    if alone:
        submission.leave()
    os.chdir(HydraConfig.get().runtime.cwd)  # paths are those of the command: Ray's workers and job.chdir go elsewhere
    recipe = cli.recipe_of(cfg, choices)
    trackers.require(recipe.cfg["tracker"])
    cli.embedded_data(recipe.cfg)
    if recipe.cfg["device"] != "cpu" and _shares_gpus(choices.get("hydra/launcher")):
        devices.claim_gpu()
    from tasks import base

    try:
        result = base.train(recipe)
    except Exception as error:
        log.error("%s failed: %s", recipe.cell.name, base.one_line(error))
        if alone and os.environ.get("HYDRA_FULL_ERROR") != "1":
            raise SystemExit(2 if isinstance(error, UserError) and not error.in_run else 1) from None
        base.let_go(error)
        raise
    if result is None:
        return None
    reported, seconds = result["reported"], result["train_seconds"]
    log.info(
        "%s: %s %.4f (%s) after %d iterations, %.1f s of training; %s",
        recipe.cell.name,
        reported["metric"],
        reported["value"],
        reported["rule"],
        result["iterations_done"],
        seconds,
        recipe.cell.directory,
    )
    return reported["value"]


def _shares_gpus(launcher: str | None) -> bool:
    """Do the jobs of this launcher take a GPU each by themselves? submitit's local ones get theirs where it is told."""
    from hydra.core.hydra_config import HydraConfig

    return launcher == "joblib" or (launcher == "submitit_local" and not HydraConfig.get().launcher.gpus_per_node)


def plan(cfg: Any, choices: Choices) -> None:
    """Print what one cell would cost, and its state."""
    from benchmarks.plan import show
    from tasks import cli

    show([cli.recipe_of(cfg, choices)])


def status(cfg: Any, choices: Choices) -> None:
    """Print the state of every cell under `out`, again every `watch` seconds where that is given."""
    from benchmarks.status import rows, show

    out = existing(cfg.out)
    show(lambda: rows(out), cfg.watch)


def report(cfg: Any, choices: Choices) -> None:
    """Write `<out>/report/` and print its table."""
    from benchmarks import console
    from benchmarks.report import build, render_terminal, survey

    out = existing(cfg.out)
    found = survey(out)
    page = build(out, found)
    console().print(render_terminal(out, found))
    log.info("report: %s", page)


def check(cfg: Any, choices: Choices) -> None:
    """Say whether the data of a task are whole. Exits 1 when something is wrong."""
    from omegaconf import OmegaConf

    from tasks import layouts, tiny, weights
    from tasks.folder import some

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    weights.address(plain)  # a slip in its name is said before anything is read
    tiny.ensure(plain)
    data, findings, decoded = layouts.check(plain)
    said, misfits = weights.look(plain, len(data.classes))
    findings += misfits
    log.info("%s in %s: %d training, %d validation samples, %d classes, %d missing",
             data.name, data.root, data.n_train, data.n_val, len(data.classes), len(data.missing))  # fmt: skip
    if other := _unlike_the_recipe(plain["task"], data):
        log.info("not the recipe's own data: %s; runs on them are other cells than the named ones", other)
    if data.left_out:
        log.info("not among them: %d training images in which nothing is annotated, left out as upstream does",
                 data.left_out)  # fmt: skip
    if data.passed_over:
        log.info("training passes over what is no sample: %s", some(data.passed_over))
    for line in said:
        log.info("%s", line)
    for line in findings:
        log.warning("%s", line)
    looked = f"all listed, {decoded} of them decoded" if decoded else "all listed, none to decode"
    if findings:
        log.info("%d findings; files: %s", len(findings), looked)
        raise SystemExit(1)
    log.info("nothing wrong found; files: %s", looked)


def _unlike_the_recipe(task: dict[str, Any], data: Any) -> str:
    """Which counts are not those of the data that the recipe is for, in words; '' where all are."""
    found = {"samples": data.n_train, "val_samples": data.n_val, "classes": len(data.classes)}
    words = {"samples": "training samples", "val_samples": "validation samples", "classes": "classes"}
    wanted = {key: task.get(key) for key in found}
    odd = [key for key in found if wanted[key] is not None and wanted[key] != found[key]]
    return ", ".join(f"{found[key]:,} {words[key]} ({wanted[key]:,})" for key in odd)


def prepare(cfg: Any, choices: Choices) -> None:
    """Do what a data set needs before training."""
    from omegaconf import OmegaConf

    from tasks import prepare, tiny

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    tiny.ensure(plain)
    for line in prepare.prepare(plain, log):
        log.info("%s", line)


def probe(cfg: Any, choices: Choices) -> None:
    """Measure this machine's throughput on one cell's work, without keeping a run."""
    from benchmarks.probe import measure
    from tasks import cli

    recipe = cli.recipe_of(cfg, choices)
    cli.embedded_data(recipe.cfg)
    measure(recipe)


MODES: dict[str, Callable[[Any, Choices], float | None]] = {
    f.__name__: f  # type: ignore[misc]
    for f in (train, plan, status, report, check, prepare, probe)
}


def existing(out: str) -> Path:
    """Raises UserError when there is no such folder of runs."""
    if not Path(out).is_dir():
        raise UserError(f"out={out}: no such folder; train something first, or say where the runs are")
    return Path(out)


def set_up_logging() -> None:
    """Send the suite's log to standard error, once, without disturbing a progress bar."""
    if log.handlers:
        return
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        with suppress(OSError):  # the terminal is gone; the run goes on, and run.log has it too
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
