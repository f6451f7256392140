"""What a configuration means: checked, and resolved to a horizon, a schedule and a cell."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from budgeted import schedules
from budgeted.budgets import Budget, Epoch, full_iterations
from budgeted.cells import Cell, signature
from budgeted.errors import UserError

Config = dict[str, Any]


class DataSummary(Protocol):
    """What is known of a data set before it is loaded: tasks.layouts.Data."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def n_train(self) -> int: ...
    @property
    def n_val(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> str | None: ...


@dataclass(frozen=True)
class Recipe:
    """A configuration resolved once: everything else derives from these.

    `full`: iterations of the full run. `total`: T, or None where the clock decides or FLOPs must be counted
    first. `seconds`: length of a clock budget. `schedule`: with warm-up and hold in it.
    """

    cfg: Config
    data: DataSummary
    epoch: Epoch
    full: int
    total: int | None
    seconds: float | None
    schedule: schedules.Schedule
    cell: Cell
    fields: Config

    def period(self, amount: str, total: int | None) -> Callable[[int, float], int]:
        """How many periods of `amount` are over after a number of steps, or at a progress: see `periods`."""
        return periods(amount, total, self.epoch)

    @property
    def work(self) -> str:
        """Six hex digits over what a training sample and an evaluation cost: who shares them shares the prices."""
        task, data = self.fields["task"], self.fields.get("data", {})
        return signature(
            {
                "task": {k: v for k, v in task.items() if k not in _COSTS_NOTHING},
                "data": {k: data.get(k) for k in ("val", "classes")},
                **{k: self.fields.get(k) for k in ("precision", "micro_batch")},
                # No part of the result, but of its cost.
                **{k: self.cfg.get(k, False) for k in ("compile", "channels_last")},
                # Its evaluations refresh batch norm first.
                "averaged": self.cfg["optimizer"]["name"] == "schedule_free",
            }
        )

    def other_root(self) -> str | None:
        """Where the data of this cell's result were, if not here and not known to be the same. It counts as done."""
        theirs = self._data_of_result()
        if self.data.digest and theirs.get("digest") == self.data.digest:
            return None
        root = theirs.get("root")
        return root if root and root != str(self.data.root.resolve()) else None

    def _data_of_result(self) -> dict[str, Any]:
        return (self.cell.result() or {}).get("data") or {}

    def refuse_other_data(self) -> None:
        """Raise UserError where the cell's result is of other data than these. Paths are no part of a cell."""
        theirs = self._data_of_result()
        if self.data.digest and theirs.get("digest") not in (None, self.data.digest):
            raise UserError(
                f"{self.cell.directory} holds a result on other data, of {theirs.get('root')}, than those of "
                f"{self.data.root}: give another out="
            )


# Values of a task that change what is learned or when it is looked at, not the work on a sample.
_COSTS_NOTHING = {
    *("weights", "lr", "weight_decay", "norm_decay", "milestones", "warmup", "dropout", "flip"),
    *("full", "last_batch", "metric", "rule", "eval_every"),
}


def resolve(cfg: Config, named: Config, data: DataSummary, gpus: int = 1) -> Recipe:
    """The recipe that `cfg` describes. `named`: what the same task, schedule and budget are with nothing else said.

    Raises UserError where a value is out of range, the budget comes to nothing or the batch exceeds the data.
    """
    task, budget = cfg["task"], Budget(cfg["budget"]["amount"])
    batch = task["batch_size"]
    if data.n_train < batch:
        raise UserError(
            f"task.batch_size={batch}: larger than the data set ({data.n_train} training samples); at most that"
        )
    if task["metric"] == "top5" and len(data.classes) <= 5:
        raise UserError(f"task.metric=top5: {data.name} has {len(data.classes)} classes; task.metric=top1")
    epoch = Epoch(data.n_train, batch, task["last_batch"])
    full = full_iterations(task["full"], epoch)
    needs_model = budget.is_clock or budget.unit == "flop"
    if budget.unit == "gpuh" and cfg["device"] == "cpu":
        raise UserError(f"budget.amount={budget.amount}: there are no GPU-hours on device=cpu; write min or h")
    fields = _affecting(cfg, data)
    cell = Cell(
        task=task["name"],
        schedule=cfg["schedule"]["name"],
        budget=budget.amount,
        seed=cfg["seed"],
        signature=signature(fields),
        departs=_other_data(named["task"], data) or _unnamed(fields) != _unnamed(_affecting(named, data)),
        out=Path(cfg["out"]),
    )
    total = None if needs_model else budget.iterations(full, epoch)
    schedule = build_schedule(cfg, full, epoch)
    if cfg["schedule"]["name"] == "replay" and total != (steps := schedules.steps_of(cfg["schedule"]["run"])):
        raise UserError(f"schedule=replay: {cfg['schedule']['run']} made {steps} steps; budget.amount={steps}it")
    if schedule.momentum_at is not None and cfg["optimizer"]["name"] == "schedule_free":
        name = cfg["schedule"]["name"]
        raise UserError(
            f"schedule={name} moves the momentum, by which optimizer=schedule_free averages: another of them"
        )
    return Recipe(
        cfg=cfg,
        data=data,
        epoch=epoch,
        full=full,
        total=total,
        seconds=budget.seconds(gpus) if budget.is_clock else None,
        schedule=schedule,
        cell=cell,
        fields=fields,
    )


def build_schedule(cfg: Config, full: int, epoch: Epoch) -> schedules.Schedule:
    """The schedule of `cfg` with the recipe's milestones and epochs filled in, its warm-up and its hold."""
    constants = {k: v for k, v in cfg["schedule"].items() if k != "name"}
    name, warm = cfg["schedule"]["name"], cfg["task"]["warmup"]
    if name == "step" and constants.get("milestones") is None:
        constants["milestones"] = cfg["task"]["milestones"]
    if name == "exp" and constants.get("T0") is None:
        constants["T0"] = float(full / epoch.iterations)
    schedule = schedules.make(name, **constants)
    if name == "replay":
        return schedule
    if cfg["hold"] is not None:
        schedule = schedules.hold(schedule, cfg["hold"])
    return schedules.warmup(schedule, warm["fraction"], warm["factor"])


def periods(amount: str, total: int | None, epoch: Epoch) -> Callable[[int, float], int]:
    """A function of (steps done, progress) that counts the periods of `amount` that are over.

    `25%` is of the run; `500it` and `1ep` are of iterations. Where the count grows, something is due.
    """
    budget = Budget(amount)
    if budget.unit == "%":
        share = budget.value / 100
        if total is None:
            return lambda steps, progress: int(progress / float(share) + 1e-9)
        return lambda steps, progress: steps * share.denominator // (share.numerator * total)
    if budget.is_clock or budget.unit == "flop":
        raise UserError(f"{amount}: a period is a percentage of the run, iterations or epochs")
    length = Fraction(max(1, budget.iterations(epoch=epoch))) if budget.unit != "ep" else _epochs(budget, epoch)
    return lambda steps, progress: steps * length.denominator // length.numerator


def _epochs(budget: Budget, epoch: Epoch) -> Fraction:
    return max(Fraction(1), budget.value * epoch.iterations)


def _affecting(cfg: Config, data: DataSummary) -> Config:
    """All that affects the result and nothing else: no paths, launchers, loggers or worker counts."""
    batch, quiet = (
        cfg["task"]["batch_size"],
        {"samples", "val_samples", "classes"},
    )  # what the data should be; what it is stands under "data"
    task = {k: v for k, v in cfg["task"].items() if k not in quiet}
    if task["weights"] != "none" and "://" not in task["weights"]:
        task["weights"] = _of_file(task["weights"])
    schedule, optimizer = dict(cfg["schedule"]), dict(cfg["optimizer"])
    if schedule.get("run"):
        schedule["run"] = _of_file(os.path.join(schedule["run"], "metrics.jsonl"))
    optimizer["lr"] = task["lr"] if optimizer.get("lr") is None else optimizer["lr"]
    return {
        "task": task,
        "schedule": schedule,
        "budget": cfg["budget"]["amount"],
        "optimizer": optimizer,
        "seed": cfg["seed"],
        "precision": cfg["precision"],
        "hold": cfg["hold"],
        "on_nonfinite": cfg["on_nonfinite"],
        # Batch norm sees a piece at a time, or one of every process: how many there are is in a result's `parts`.
        "micro_batch": cfg["micro_batch"] if (cfg["micro_batch"] or batch) < batch else None,
        "data": {
            "subset": cfg["data"]["subset"],
            "train": data.n_train,
            "val": data.n_val,
            "classes": len(data.classes),
        },
    }


def _of_file(path: str) -> str:
    """What stands for a file in a recipe: its content, wherever it lies and whatever it is called."""
    try:
        found = os.stat(path := os.path.expanduser(path))
        return f"sha256:{_digest(path, found.st_size, found.st_mtime_ns)}"
    except OSError:
        return f"file:{os.path.basename(path)}"


@functools.lru_cache(maxsize=256)
def _digest(path: str, size: int, mtime: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _unnamed(fields: Config) -> Config:
    """What the directory's name does not say already."""
    return {k: v for k, v in fields.items() if k not in ("budget", "seed")}


def _other_data(task: Config, data: DataSummary) -> bool:
    """Is this other data than the recipe is for? (`task.samples` and the like, where they are fixed.)"""
    found = {"samples": data.n_train, "val_samples": data.n_val, "classes": len(data.classes)}
    nominal = ((task.get(key), count) for key, count in found.items())
    return any(wanted is not None and wanted != found for wanted, found in nominal)


_ABSENT = object()
# A rule is a test and the words for it.
Rule = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = float("inf"), words: str = "") -> Rule:
    return (
        lambda v: not isinstance(v, bool) and isinstance(v, int | float) and low <= v < high,
        words or (f"a number in [{low}, {high})" if high < float("inf") else f"a number of at least {low}"),
    )


def _whole(low: int, optional: bool = False) -> Rule:
    words = f"a whole number of at least {low}" + (" or null" if optional else "")
    return lambda v: (v is None and optional) or (type(v) is int and v >= low), words


def _one_of(*choices: Any) -> Rule:
    return lambda v: v in choices and isinstance(v, bool) == (v in (True, False)), "one of " + ", ".join(
        map(str, choices)
    )


def _pair(low: float, high: float, whole: bool, rising: bool, words: str) -> Rule:
    def ok(v: Any) -> bool:
        kinds = (int,) if whole else (int, float)
        if not (isinstance(v, list) and len(v) == 2 and all(type(x) in kinds and low <= x <= high for x in v)):
            return False
        return v[0] <= v[1] or not rising

    return ok, words


def _either(*rules: Rule) -> Rule:
    return lambda v: any(ok(v) for ok, _ in rules), " or ".join(words for _, words in rules)


def _amount(v: Any) -> bool:
    try:
        return bool(Budget(str(v)))
    except UserError:
        return False


def _period(v: Any) -> bool:
    try:
        return bool(periods(str(v), 1, Epoch(10**6, 1)))
    except UserError:
        return False


# The metrics that a task can be judged by; all of them are stored.
METRICS = {
    "classification": ("top1", "top5"),
    "video": ("top1", "top5"),
    "detection": ("box_ap", "mask_ap"),
    "segmentation": ("miou",),
}
FLAG: Rule = (lambda v: isinstance(v, bool), "true or false")
PERIOD: Rule = (_period, "a period such as 25%, 500it or 1ep")
DIRECTORY: Rule = (
    lambda v: isinstance(v, str) and bool(re.fullmatch(r"[A-Za-z0-9][\w.+-]*", v, re.ASCII)),
    "a word: it names a folder",
)
WORD: Rule = (lambda v: isinstance(v, str) and bool(v), "a name")
FRACTIONS: Rule = (
    lambda v: isinstance(v, list) and all(isinstance(m, int | float) and 0 < m < 1 for m in v),
    "a list of fractions in (0, 1)",
)
RULES: dict[str, Rule] = {
    "out": WORD,
    "seed": (
        lambda v: type(v) is int and 0 <= v < 10**9,
        "a whole number from 0 to 999999999 (several: -m 'seed=range(3)')",
    ),
    "device": _one_of("auto", "cpu", "cuda"),
    "precision": _one_of("fp32", "bf16"),
    "compile": FLAG,
    "channels_last": FLAG,
    "micro_batch": _whole(1, optional=True),
    "hold": _whole(1, optional=True),
    "log_every": _whole(1),
    "on_nonfinite": _one_of("stop", "skip"),
    "grad_norm": FLAG,
    "checkpoint.every": PERIOD,
    "checkpoint.minutes": _number(0),
    "code": _one_of("warn", "stop", "ignore"),
    "tracker": _one_of("none", "tensorboard", "wandb", "mlflow"),
    "watch": (lambda v: v is None or (_number(0)[0](v) and v > 0), "a positive number of seconds or null"),
    "prepare.labels": (lambda v: v is None or WORD[0](v), "a path or null"),
    "prepare.short_side": _whole(1, optional=True),
    "prepare.workers": _whole(0),
    "plan.samples_per_second": (lambda v: v is None or (_number(0)[0](v) and v > 0), "a positive number or null"),
    "plan.evaluate": FLAG,
    "task.name": DIRECTORY,
    "task.adapter": _one_of(*METRICS),
    "task.augment": _one_of("imagenet", "cifar"),
    "task.size": _whole(1),
    "task.model": WORD,
    "task.weights": WORD,
    "task.batch_size": _whole(1),
    "task.lr": (lambda v: _number(0)[0](v) and v > 0, "a positive number"),
    "task.weight_decay": _number(0),
    "task.full": (_amount, "an amount such as 100ep or 90000it"),
    "task.last_batch": _one_of("drop", "keep", "carry"),
    "task.milestones": FRACTIONS,
    "task.warmup.fraction": _number(0, 1),
    "task.warmup.factor": _number(0, 1 + 1e-9, "a number in [0, 1]"),
    "task.metric": WORD,
    "task.rule": _one_of("best", "final"),
    "task.eval_every": PERIOD,
    "task.crop_scale": _pair(1e-9, 1, False, True, "two rising shares in (0, 1]"),
    "task.scale": _pair(1, 10**5, True, False, "two whole numbers of pixels"),
    "task.crop": _either(_whole(1), _pair(1, 10**5, True, False, "two of them, [height, width]")),
    "task.test_crop": _whole(1),
    "task.frames": _whole(1),
    "task.stride": _whole(1),
    "task.clips": _whole(1),
    "task.crops": _whole(1),
    "task.flip": _number(0, 1 + 1e-9, "a number in [0, 1]"),
    "task.dropout": _number(0, 1),
    "task.norm_decay": _number(0),
    "task.precise_bn": _whole(0),
    "task.val_batch_size": _whole(1, optional=True),
    "task.options": (lambda v: isinstance(v, dict), "a section, such as {INPUT: {MIN_SIZE_TEST: 640}}"),
    "optimizer.lr": (lambda v: v is None or (_number(0)[0](v) and v > 0), "a positive number or null"),
    "optimizer.weight_decay": (lambda v: v is None or _number(0)[0](v), "a number of at least 0 or null"),
    "optimizer.momentum": _number(0, 1),
    "optimizer.alpha": _number(0, 1),
    "optimizer.betas": _pair(0, 1 - 1e-12, False, False, "two numbers in [0, 1)"),
    "optimizer.eps": _number(0),
    "optimizer.nesterov": FLAG,
    "data.workers": _whole(0),
    "data.subset": _whole(1, optional=True),
}


def validate(cfg: Config) -> None:
    """Check types and ranges. Raises UserError that names the first value that is wrong."""
    for key, (ok, words) in RULES.items():
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part, _ABSENT)
        if value is not _ABSENT and not ok(value):
            raise UserError(f"{key}={value}: must be {words}")
    task, metrics = cfg["task"], METRICS[cfg["task"]["adapter"]]
    if task["metric"] not in metrics:
        raise UserError(f"task.metric={task['metric']}: {task['name']} is judged by {' or '.join(metrics)}")
    if cfg["task"]["full"].endswith(("min", "h", "%", "flop")):
        raise UserError(f"task.full={cfg['task']['full']}: the full run is in ep, it or im")
    crop, scale = cfg["task"].get("crop"), cfg["task"].get("scale")
    if cfg["task"]["adapter"] == "video" and not crop <= scale[0] <= scale[1]:
        raise UserError(f"task.scale={scale}: two short sides, rising, from task.crop={crop} up")
    if cfg["optimizer"].get("nesterov") and not cfg["optimizer"]["momentum"]:
        raise UserError("optimizer.momentum=0: Nesterov's needs one; set optimizer.nesterov=false")
    if cfg["optimizer"]["name"] == "schedule_free" and not cfg["optimizer"]["momentum"]:
        raise UserError("optimizer.momentum=0: Schedule-Free averages by it; a number in (0, 1)")
    Budget(cfg["budget"]["amount"])


def same_types(cfg: Config, named: Config) -> None:
    """Raise UserError for a value of another type than the one it replaces; null may become anything."""
    wanted = flatten(named)
    for key, value in flatten(cfg).items():
        like = wanted.get(key)
        if like is None or value is None or key.startswith("task.options."):
            continue
        for kind, words in ((bool, "true or false"), (int | float, "a number"), (str, "a word"), (list, "a list")):
            if isinstance(like, kind):
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                    raise UserError(f"{key}={value}: must be {words}, like {like}")
                break


def known_key(key: str, cfg: Config) -> None:
    """Raise UserError when `key` (dotted) is not in `cfg`, with the nearest that is."""
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
    if node is not _ABSENT or (key.startswith("task.options.") and "options" in cfg["task"]):
        return
    if key.startswith("schedule."):
        schedule = cfg["schedule"]
        own = ", ".join(k for k in schedule if k != "name") or "none"
        raise UserError(
            f"{key}: no such constant of schedule={schedule['name']} ({own}); sweep those that have it apart"
        )
    known = flatten(cfg)
    sections = {".".join(k.split(".")[:n]) for k in known for n in range(1, k.count(".") + 1)}
    last = key.rsplit(".", 1)[-1]
    same_last = [k for k in known if k.rsplit(".", 1)[-1] == last]
    others = [k for k in (*known, *sections) if not key.startswith(f"{k}.")]
    near = same_last or difflib.get_close_matches(key, others, n=1, cutoff=0.6)
    beside = [k for k in known if "." in key and k.startswith(key.rsplit(".", 1)[0] + ".")]
    if near:
        raise UserError(f"{key}: no such key; did you mean {' or '.join(map(repr, near))}?")
    raise UserError(f"{key}: no such key; {'there are ' + ', '.join(beside) if beside else '--cfg job lists all'}")


def flatten(cfg: Config, prefix: str = "") -> dict[str, Any]:
    """{"task": {"lr": .1}} becomes {"task.lr": .1}."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
