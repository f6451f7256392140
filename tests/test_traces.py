"""What each framework's optimizer really had in its parameter groups at each update, against the formula.

Trainer, data, parameters and optimizer are the task's own. In detectron2 and mmseg the losses of long runs are the sum of
all parameters, as theirs would take minutes: a learning rate asks for no loss.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from budgeted.budgets import Epoch
from budgeted.recipe import build_schedule
from tasks import base, cli

ROOT = Path(__file__).resolve().parent.parent
METRIC = {"imagenet_tiny": "top1", "kinetics_tiny": "top1", "coco_tiny": "box_ap", "cityscapes_tiny": "miou"}
SCHEDULES = [s for s in cli.options("schedule") if s not in cli.NEED_A_RUN]
# Cityscapes needs two images a batch: batch norm over one pooled value is refused.
BATCH = {"imagenet_tiny": 2, "kinetics_tiny": 2, "coco_tiny": 1, "cityscapes_tiny": 2}
LOSS = {
    "coco_tiny": "detectron2.modeling.GeneralizedRCNN.forward",
    "cityscapes_tiny": "mmseg.models.EncoderDecoder.loss",
}


def sum_of_parameters(model, *args):
    return {"loss_all": sum(p.sum() for p in model.parameters()) * 1e-6}


def trace(task: str, schedule: str, total: int, out: Path, monkeypatch) -> None:
    words = (
        f"task={task}", f"schedule={schedule}", f"budget.amount={total}it", f"out={out}", "log_every=1",
        f"task.batch_size={BATCH[task]}", "task.warmup.fraction=0.3", "task.warmup.factor=0.1",
    )  # fmt: skip
    recipe = cli.recipe(words)
    cli.embedded_data(recipe.cfg)
    module, name = base.ADAPTERS[recipe.cfg["task"]["adapter"]].split(":")
    adapter = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(adapter, "evaluate", lambda self: {METRIC[task]: 0.0})
    seen: list[list[tuple[float, float]]] = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        seen.append([(group["lr"], group["momentum"]) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    base.train(recipe)
    cfg = recipe.cfg
    epoch = Epoch(recipe.data.n_train, BATCH[task], cfg["task"]["last_batch"])
    formula = build_schedule(cfg, recipe.full, epoch)
    ramp = lambda p: 0.1 + 0.9 * p / 0.3 if p < 0.3 else 1.0  # noqa: E731
    plain = build_schedule(
        {**cfg, "task": {**cfg["task"], "warmup": {"fraction": 0.0, "factor": 1.0}}}, recipe.full, epoch
    )
    wanted = [cfg["task"]["lr"] * plain(t / total) * ramp(t / total) for t in range(total)]
    for group in zip(*seen, strict=True):
        assert [lr for lr, _ in group] == pytest.approx(wanted, rel=1e-9, abs=1e-15)
        if formula.momentum_at is not None:
            momenta = [formula.momentum_at(t / total) for t in range(total)]
            assert [m for _, m in group] == pytest.approx(momenta, rel=1e-9)
    lines = [json.loads(x) for x in recipe.cell.metrics.read_text().splitlines()]
    assert [x["lr"] for x in lines if "lr" in x] == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 7])
def test_imagenet_short(schedule, total, tmp_path, monkeypatch):
    trace("imagenet_tiny", schedule, total, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("task", METRIC)
def test_every_framework(task, total, tmp_path, monkeypatch):
    cli.recipe((f"task={task}",))  # detectron2 and mmseg need help before they can be imported
    for schedule in SCHEDULES:
        with monkeypatch.context() as patch:
            if total > 1 and task in LOSS:
                patch.setattr(LOSS[task], sum_of_parameters)
            trace(task, schedule, total, tmp_path, patch)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1%", "100%"])
def test_the_percentages(budget, tmp_path):
    """The recipe's own run at 1% and 100% of imagenet_tiny, cut to two epochs."""
    recipe = cli.recipe((f"budget={budget}", "task.full=2ep", "schedule=cosine", f"out={tmp_path}"))
    cli.embedded_data(recipe.cfg)
    base.train(recipe)
    total = {"1%": 1, "100%": 124}[budget]
    lines = [json.loads(x) for x in recipe.cell.metrics.read_text().splitlines()]
    schedule = recipe.schedule
    assert [x["lr"] for x in lines if "lr" in x] == pytest.approx(
        [0.05 * schedule(t / total) for t in range(total)], rel=1e-9
    )
