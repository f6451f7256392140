"""Shared by the engine's tests: a quiet machine, and a run small enough to be trained in milliseconds."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["BUDGETED_BAR"] = "0"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from budgeted import schedules  # noqa: E402
from budgeted.budgets import Budget, Epoch  # noqa: E402
from budgeted.cells import Cell, signature  # noqa: E402
from budgeted.distributed import World  # noqa: E402
from budgeted.recipe import Recipe  # noqa: E402
from budgeted.session import Session  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("quick", max_examples=100, deadline=None, database=None, derandomize=True)
settings.load_profile("quick")


@dataclass(frozen=True)
class ToyData:
    """What a recipe knows of a data set."""

    name: str = "toy"
    root: Path = Path("toy")
    n_train: int = 40
    n_val: int = 8
    classes: tuple[str, ...] = ("a", "b")
    missing: tuple[str, ...] = ()
    digest: str | None = None


@dataclass
class Toy:
    """Forty random points on a line fitted by a two-layer net with dropout, so that every stream of randomness counts.

    `before(step)` is called ahead of each update, `loss(step, value)` may replace a loss, `scores` are what
    evaluations return in turn (None: minus the loss over all points).
    """

    recipe: Recipe
    total: int | None
    before: Callable[[Session], None] = lambda session: None
    loss: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, value: value
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)
    scores: list[float] | None = None
    rates: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor([index / 40.0]) + 0.01 * torch.randn(1)
        return x, torch.sin(6 * x)

    def train(self, stop_at: int | None = None) -> dict[str, Any] | None:
        """Train to the end and return the result, or leave after `stop_at` updates without a word, as a kill does."""
        session = Session(self.recipe, self.total, World(), torch.device("cpu"))
        torch.manual_seed(session.seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)
        )
        optimizer = self.optimizer(model.parameters())
        self.recipe.cell.directory.mkdir(parents=True, exist_ok=True)
        try:
            session.attach(model, optimizer, lambda: self._evaluate(model))
            self.session = session
            batches = session.loader(self)
            while not session.finished and session.step != stop_at:
                x, y = next(batches)
                session.before_step()
                self.before(session)
                value = self.loss(session.step, (model(x) - y).square().mean())
                optimizer.zero_grad()
                value.backward()
                self.rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                session.after_step(value)
            return None if session.step == stop_at else session.finish()
        finally:
            session.close()

    def _evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        if self.scores is not None:
            return {"top1": self.scores.pop(0)}
        model.eval()
        x = torch.arange(40).unsqueeze(1) / 40.0
        with torch.inference_mode():
            value = -float((model(x) - torch.sin(6 * x)).square().mean())
        model.train()
        return {"top1": value}


def toy_recipe(out: Path, schedule: str = "linear", amount: str = "20it", **changed: Any) -> Recipe:
    """A recipe built by hand: 40 samples in batches of 4, ten iterations an epoch, two epochs the full run."""
    cfg: dict[str, Any] = {
        "out": str(out), "seed": 0, "device": "cpu", "precision": "fp32", "micro_batch": None, "hold": None,
        "log_every": 1, "on_nonfinite": "stop", "grad_norm": False,
        "checkpoint": {"every": "25%", "minutes": 10},
        "task": {"name": "toy", "model": "net", "batch_size": 4, "lr": 0.1, "metric": "top1", "rule": "best", "eval_every": "50%"},
        "optimizer": {"name": "sgd", "lr": None}, "data": {"workers": 0, "subset": None},
    }  # fmt: skip
    for key, value in changed.items():
        node = cfg
        *sections, last = key.split("__")
        for section in sections:
            node = node[section]
        assert last in node, key
        node[last] = value
    epoch, budget = Epoch(40, cfg["task"]["batch_size"], "drop"), Budget(amount)
    fields = {k: v for k, v in cfg.items() if k not in ("out", "data", "log_every")} | {
        "schedule": schedule,
        "budget": amount,
    }
    return Recipe(
        cfg=cfg,
        data=ToyData(),
        epoch=epoch,
        full=20,
        total=None if budget.is_clock else budget.iterations(20, epoch),
        seconds=budget.seconds() if budget.is_clock else None,
        schedule=schedules.make(schedule),
        cell=Cell("toy", schedule, amount, cfg["seed"], signature(fields), False, out),
        fields=fields,
    )


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the suite's log says at any level, wherever it is sent."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("budgeted")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield lines
    log.removeHandler(handler)
    log.setLevel(before)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Toy]:
    """toy(schedule=, amount=, seed=..., task__rule=...) makes a run under the test's own folder."""

    def make(out: Path | None = None, scores: list[float] | None = None, **changed: Any) -> Toy:
        recipe = toy_recipe(out or tmp_path / "runs", **changed)
        return Toy(recipe, recipe.total, scores=scores)

    return make
