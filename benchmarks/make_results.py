"""Writes synthetic run directories, to try the report on: python -m benchmarks.make_results DIR --count 10000.

The values follow a made-up law of the budget; the device of every run is named "synthetic".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from budgeted.cells import digest
from tasks import tiny

BUDGETS = ("1%", "5%", "10%", "25%", "50%", "100%")
# task -> metric, rule, full iterations, batch, value at 1% and at 100%, training and validation samples
TASKS: dict[str, tuple[str, str, int, int, float, float, int, int]] = {
    "imagenet": ("top1", "best", 500_400, 256, 0.26, 0.695, 1_281_167, 50_000),
    "coco": ("box_ap", "final", 90_000, 16, 0.05, 0.378, 117_266, 5_000),
    "cityscapes": ("miou", "best", 148_750, 8, 0.52, 0.764, 2_975, 500),
    "kinetics": ("top1", "final", 300_000, 32, 0.31, 0.72, 240_000, 19_800),
    "cifar10_resnet20": ("top1", "best", 105_600, 128, 0.70, 0.925, 45_000, 5_000),
    "imagenet_tiny": ("top1", "best", 400, 32, 0.2, 0.9, 320, 80),
}
EDGE = {
    "linear": 0.9, "rex": 1.0, "cosine": 0.8, "poly": 0.85, "htd": 0.6, "knee": 0.5, "wsd": 0.75, "step": 0.0,
    "exp": -0.3, "onecycle": -0.4, "sgdr": -0.6, "uba": 0.3, "refined": 0.7, "inverse": -0.9, "constant": -2.0,
}  # fmt: skip
SCHEDULES = tuple(EDGE)


def shape(schedule: str, p: float) -> float:
    """Roughly the schedule's curve, for the pictures only."""
    curves = {
        "step": 0.1 ** ((p >= 1 / 3) + (p >= 2 / 3)), "constant": 1.0, "cosine": (1 + math.cos(math.pi * p)) / 2,
        "rex": (1 - p) / (0.5 + (1 - p) / 2), "exp": math.exp(-3 * p), "onecycle": 1 - 0.9 * abs(2 * p - 1),
        "knee": min(1.0, 2 - 2 * p), "wsd": 1.0 if p < 0.8 else 1 - math.sqrt((p - 0.8) / 0.2),
        "inverse": 1 / (1 + 10 * p), "poly": (1 - p) ** 0.9, "sgdr": (1 + math.cos(math.pi * (4 * p % 1))) / 2,
    }  # fmt: skip
    return curves.get(schedule, 1 - p)


def record(task: str, schedule: str, budget: str, seed: int, signature: str, rng: random.Random) -> dict[str, Any]:
    """One result.json."""
    metric, rule, full, batch, low, high, n_train, n_val = TASKS[task]
    fraction = float(budget[:-1]) / 100
    iterations = max(1, round(fraction * full))
    level = low + (high - low) * (1 + math.log10(fraction) / 2) ** 0.6 + 0.02 * EDGE.get(schedule, 0.0) * (1 - fraction)
    value = min(1.0, max(0.0, level + rng.gauss(0, 0.003)))
    values = {"final": value - (0.001 if rule == "best" else 0), "best": value + (0 if rule == "best" else 0.001)}
    step = iterations - 1 if schedule in ("linear", "rex", "cosine") else round(0.93 * iterations)
    metrics = {metric: values | {"best_step": step}}
    if task == "coco":
        metrics["mask_ap"] = {k: v * 0.9 for k, v in values.items()} | {"best_step": step}
    rate = 2400.0 if task.startswith("imagenet") else 300.0
    seconds = iterations * batch / rate
    return {
        "schema": 1, "task": task, "schedule": schedule, "optimizer": "sgd",
        "budget": {"amount": budget, "fraction": fraction, "iterations": iterations, "full_iterations": full},
        "seed": seed, "signature": signature, "status": "done",
        "reported": {"metric": metric, "rule": rule, "value": values[rule]}, "metrics": metrics,
        "iterations_done": iterations, "samples_seen": iterations * batch, "train_seconds": seconds,
        "eval_seconds": seconds * 0.05, "data_wait_seconds": seconds * 0.02, "compile_seconds": 0.0,
        "samples_per_second": rate, "peak_memory_bytes": 7 * 2**30, "device": "synthetic", "precision": "fp32",
        "world_size": 1, "resumed": 0,
        "parts": [{"step": 0, "code": "0" * 12, "world_size": 1, "device": "synthetic"}],
        "data": {
            "name": task, "root": f"/data/{task}", "n_train": n_train, "n_val": n_val, "missing": 0,
            "classes": 10, "digest": tiny.digest(task) if task in tiny.COUNTS else digest({"of": task})[:12],
        },
        "weights_sha256": hashlib.sha256(f"{task}{schedule}{budget}{seed}".encode()).hexdigest(),
        "versions": {"torch": "2.14.1", "python": "3.11.7"}, "git": {"commit": "0" * 40, "dirty": False},
        "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-02T00:00:00+00:00",
    }  # fmt: skip


def write_run(out: Path, data: dict[str, Any], suffix: str = "", curve: bool = False) -> Path:
    """Writes a finished run where its cell belongs and returns the directory."""
    name = f"s{data['seed']}" + (f"-{suffix}" if suffix else "")
    path = Path(out) / data["task"] / data["schedule"] / data["budget"]["amount"] / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "result.json").write_text(json.dumps({**data, "digest": digest(data)}))
    total = data["iterations_done"]
    (path / "state.json").write_text(json.dumps({"state": "done", "step": total, "total": total, "error": None}))
    if curve:
        (path / "metrics.jsonl").write_text("".join(_lines(data, total)))
    return path


def _lines(data: dict[str, Any], total: int) -> list[str]:
    rng = random.Random(1)
    lines = []
    for index in range(min(total, 400)):
        step = index * total // min(total, 400)
        p = step / total
        lr = 0.1 * shape(data["schedule"], p)
        loss = 0.8 + 5 * math.exp(-6 * p) + 6 * lr + rng.gauss(0, 0.15)
        lines.append(json.dumps({"step": step, "progress": p, "lr": lr, "loss": loss}) + "\n")
    lines.append(json.dumps({"step": total - 1, "eval": {"top1": 0.5}}) + "\n")
    return lines


def make(
    out: Path,
    count: int,
    tasks: tuple[str, ...] = tuple(TASKS),
    schedules: tuple[str, ...] = SCHEDULES,
    budgets: tuple[str, ...] = BUDGETS,
) -> int:
    """Writes `count` finished runs, seed by seed over tasks x schedules x budgets; returns how many."""
    written = 0
    while written < count:
        seed = written // (len(tasks) * len(schedules) * len(budgets))
        for task in tasks:
            for schedule in schedules:
                for budget in budgets:
                    if written >= count:
                        return written
                    rng = random.Random(f"{task} {schedule} {budget} {seed}")
                    signature = f"{rng.getrandbits(24):06x}"
                    data = record(task, schedule, budget, seed, signature, rng)
                    write_run(out, data, curve=seed == 0)
                    written += 1
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    args = parser.parse_args()
    make(args.out, args.count, tuple(args.tasks.split(",")), tuple(args.schedules.split(",")))


if __name__ == "__main__":
    main()
