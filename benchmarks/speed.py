"""What the suite costs: `python -m benchmarks.speed` prints a table of medians. Ratios are of interleaved repeats.

scheduler    microseconds per step that BudgetedLR costs beyond torch's LambdaLR
checkpoint   what checkpoints every 5% (the default) cost a run, as a share of its time
data         seconds for a task's samples from the position-addressed loader over a plain DataLoader's
<adapter>    seconds per iteration through the adapter over the upstream trainer's own

Words name rows: `python -m benchmarks.speed adapter "checkpoint, coco"`. key=value goes to the recipes of `data`:
`python -m benchmarks.speed "data, coco" data.root=/data/coco`.
"""

from __future__ import annotations

import importlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from budgeted import BudgetedLR, make
from budgeted.data import Batches, loader
from budgeted.machine import device_name

REPEATS, DATA_REPEATS = 15, 60
SAVING = 60  # seconds of runs that checkpoints are measured over, at the least
AFTER = 3  # steps after a save within which its write is over
SAMPLES = {"imagenet_tiny": 1024, "kinetics_tiny": 80, "coco_tiny": 120, "cityscapes_tiny": 80}  # about a second each


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = REPEATS) -> Sequence[float]:
    """Median seconds of `ours` and of `theirs`, timed in turns, and the median of the pairs' ratios.

    Each goes first in every other pair: the second finds the caches warm.
    """
    pairs = []
    for k in range(repeats):
        seconds = {}
        for run in (ours, theirs) if k % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - start
        pairs.append((seconds[ours], seconds[theirs]))
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def scheduler(groups: int = 1, steps: int = 5000) -> dict[str, float]:
    """Microseconds per step of BudgetedLR (linear) and of torch's LambdaLR with the same function."""

    def timed(build: Callable[[torch.optim.Optimizer], Any]) -> Callable[[], None]:
        parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        schedule = build(optimizer)
        optimizer.step()

        def run() -> None:
            for _ in range(steps):
                schedule.step()

        return run

    total = steps * (REPEATS + 1)
    ours = timed(lambda o: BudgetedLR(o, make("linear"), total))
    theirs = timed(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 - t / total))
    a, b, ratio = interleaved(ours, theirs)
    return {"ours_us": 1e6 * a / steps, "lambda_us": 1e6 * b / steps, "ratio": ratio}


def data_order(task: str, samples: int, words: Sequence[str] = ()) -> dict[str, float]:
    """Seconds for `samples` of a task's own dataset, in the main process: ours, and torch's shuffling loader.

    Each repeat is another part of the order with other augmentations on both sides: their work is equal on average.
    """
    from tasks import base, cli

    recipe = cli.recipe((f"task={task}", "data.workers=0", *words))
    cli.embedded_data(recipe.cfg)
    adapter: Any = base.adapter_of(recipe.cfg)(recipe.cfg, recipe.data, torch.device("cpu"))
    dataset = adapter.train_images if task.startswith("coco") else adapter.train_dataset()
    batch = recipe.cfg["task"]["batch_size"]
    count, steps = samples // batch, itertools.count(step=samples // batch)

    def ours() -> None:
        start = next(steps)
        for _ in loader(dataset, 0, Batches(recipe.epoch, start, start + count), collate_fn=list):
            pass

    def theirs() -> None:
        order = torch.utils.data.RandomSampler(dataset, num_samples=count * batch)
        for _ in torch.utils.data.DataLoader(dataset, batch, sampler=order, collate_fn=list):
            pass

    a, b, ratio = interleaved(ours, theirs, DATA_REPEATS)
    return {"ours_s": a, "torchs_s": b, "ratio": ratio}


def checkpoints(task: str) -> dict[str, float]:
    """What checkpoints every 5% cost a full run of `task`, as a share of its time, over a minute of runs.

    `waits` is the median time that training waits in Session.save, in ms. `slowed` is what the three steps after it
    take longer than the same steps of a run that does not save, in ms: medians, less that of all other steps, since
    the write goes on beside them. The last save is not counted, as nothing runs beside it.
    """
    waits: list[float] = []
    longer: dict[int, list[float]] = defaultdict(list)  # by how many steps after a save
    seconds, saves, total = [], 0, 0.0
    while total < SAVING:
        mb, waited, steps = _run_with_saves(task, "5%")
        *_, plain = _run_with_saves(task, "100%")
        waits += waited
        for (after, took), (_, usual) in zip(steps, plain, strict=True):
            longer[min(after, AFTER + 1)].append(took - usual)
            seconds.append(usual)
        saves, total = saves + len(waited), total + sum(usual for _, usual in plain)
    drift = statistics.median(longer.pop(AFTER + 1))
    wait, slowed = statistics.median(waits), sum(statistics.median(found) - drift for found in longer.values())
    step = 1e3 * statistics.median(seconds)
    share = saves * (wait + slowed) / total
    return {"mb": mb, "step": step, "waits": 1e3 * wait, "slowed": 1e3 * slowed, "share": share}


def _run_with_saves(task: str, every: str) -> tuple[float, list[float], list[tuple[int, float]]]:
    """A run of `task`: the MB of its checkpoint, seconds in each save, and of each step (how many after a save)."""
    from budgeted.clock import Clock
    from budgeted.session import Session
    from tasks import base, cli

    waits: list[float] = []
    steps: list[tuple[int, float]] = []
    since, save, tick = itertools.count(AFTER + 1), Session.save, Clock.tick

    def timed(self: Session) -> None:
        nonlocal since
        start = time.perf_counter()
        save(self)
        waits.append(time.perf_counter() - start)
        since = itertools.count(1)

    def ticked(self: Clock) -> None:
        before = self.elapsed
        tick(self)
        steps.append((next(since), self.elapsed - before))

    with tempfile.TemporaryDirectory() as out:
        with mock.patch.object(Session, "save", timed), mock.patch.object(Clock, "tick", ticked):
            words = (f"task={task}", "budget=100%", "task.eval_every=100%", f"checkpoint.every={every}", f"out={out}")
            recipe = cli.recipe(words)
            cli.embedded_data(recipe.cfg)
            base.train(recipe)
        return recipe.cell.checkpoint.stat().st_size / 1e6, waits[:-1], steps[AFTER:]


def main(arguments: Sequence[str]) -> None:
    names, words = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    os.environ["BUDGETED_BAR"] = "0"
    torch.set_num_threads(1)
    print(f"{device_name(torch.device('cpu'))}; torch {torch.__version__}; medians of {REPEATS} interleaved repeats")
    measures: dict[str, Callable[[], dict[str, float]]] = {
        "scheduler": scheduler,
        "scheduler, 10 groups": lambda: scheduler(groups=10, steps=2000),
        **{f"data, {t}": lambda t=t, n=n: data_order(t, n, words) for t, n in SAMPLES.items()},  # type: ignore[misc]
        **{f"checkpoint, {t}": lambda t=t: checkpoints(t) for t in _tiny_tasks()},  # type: ignore[misc]
        **adapters(),
    }
    for name, measure in measures.items():
        if not names or any(name.startswith(n) for n in names):
            found = measure()
            print(f"{name:28}", "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)


def _tiny_tasks() -> list[str]:
    conf = Path(__file__).resolve().parent.parent / "conf" / "task"
    return sorted(p.stem for p in conf.glob("*_tiny.yaml"))


def adapters() -> dict[str, Callable[[], dict[str, float]]]:
    """Seconds per iteration through each adapter over the upstream trainer's own, on the same work."""
    plain = {
        "imagenet_tiny": "plain_loop",
        "kinetics_tiny": "plain_loop",
        "coco_tiny": "plain_detectron2",
        "cityscapes_tiny": "plain_mmseg",
    }
    return {f"adapter, {task}": lambda t=task, m=module: adapter(t, m) for task, module in plain.items()}  # type: ignore[misc]


def adapter(task: str, module: str, warm: int = 5, repeats: int = 60) -> dict[str, float]:
    """Median seconds of one iteration, loading included: ours, upstream's, and the median ratio."""
    from tasks import cli

    with tempfile.TemporaryDirectory() as out:
        words = (f"task={task}", "budget.amount=100000it", "task.eval_every=100%", "data.workers=0", f"out={out}")
        recipe = cli.recipe(words)
        cli.embedded_data(recipe.cfg)
        recipe.cell.directory.mkdir(parents=True)
        ours, theirs = importlib.import_module(f"benchmarks.{module}").steps(recipe)
        for _ in range(warm):
            ours()
            theirs()
        a, b, ratio = interleaved(ours, theirs, repeats)
    return {"ours_ms": 1e3 * a, "upstream_ms": 1e3 * b, "ratio": ratio}


if __name__ == "__main__":
    main(sys.argv[1:])
