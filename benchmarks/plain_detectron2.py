"""detectron2's own DefaultTrainer on the model and data of a cell: what the detection adapter is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from budgeted.distributed import World
from budgeted.recipe import Recipe
from budgeted.session import Session
from tasks.detection import COCOEvaluator, DefaultTrainer, Detection, EventStorage, HookBase, trivial_batch_collator

from detectron2.data import build_detection_train_loader  # isort: skip  # after tasks.detection, which helps it


class PlainTrainer(DefaultTrainer):
    """Upstream's trainer with its own scheduler, hooks and writers, on `batches` where they are given."""

    batches: Iterable[list[dict]] | None = None

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return cls.batches

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def plain_trainer(
    adapter: Detection, batches: Iterable[list[dict]], folder: Path, total: int, hooks: Iterable[HookBase] = ()
) -> PlainTrainer:
    """A DefaultTrainer for `total` iterations, with upstream's drops and warm-up at the fractions of the recipe.

    `hooks` come after upstream's own. The weights are drawn from the seed of the adapter's recipe.
    """
    task, config = adapter.cfg["task"], adapter.config.clone()
    config.SOLVER.MAX_ITER = config.SOLVER.CHECKPOINT_PERIOD = total
    config.SOLVER.STEPS = tuple(round(fraction * total) for fraction in task["milestones"])
    config.SOLVER.WARMUP_ITERS = round(task["warmup"]["fraction"] * total)
    config.SOLVER.WARMUP_FACTOR = float(task["warmup"]["factor"])
    config.DATASETS.TEST = (adapter.names["val"],)
    config.OUTPUT_DIR = str(folder)
    kind = type("PlainTrainer", (PlainTrainer,), {"batches": batches})
    torch.manual_seed(adapter.cfg["seed"])
    trainer = kind(config)
    trainer.register_hooks(list(hooks))
    return trainer


def steps(recipe: Recipe) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that each make one update: the adapter's and DefaultTrainer's, on equal models.

    Both load from the disk in the main process; `recipe` is to have a budget that neither will reach.
    """
    adapter = Detection(recipe.cfg, recipe.data, torch.device("cpu"))
    session = Session(recipe, recipe.total, World(), torch.device("cpu"))
    adapter.build(session)
    source = build_detection_train_loader(
        adapter.train_images,
        mapper=None,
        total_batch_size=recipe.cfg["task"]["batch_size"],
        collate_fn=trivial_batch_collator,
    )
    plain = plain_trainer(adapter, source, recipe.cell.directory / "plain", session.total)
    return one_step(adapter.trainer), one_step(plain)


def one_step(trainer: DefaultTrainer) -> Callable[[], None]:
    """A function that makes the next update of a trainer outside its loop, hooks included."""
    storage = EventStorage(0)
    trainer.storage, trainer.iter = storage, -1
    with storage:
        trainer.before_train()

    def step() -> None:
        trainer.iter += 1
        with storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()

    return step
