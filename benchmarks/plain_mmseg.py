"""mmengine's own Runner, untouched, on a cell's model and data: what the segmentation adapter is measured against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from budgeted.distributed import World
from budgeted.recipe import Recipe
from budgeted.session import Session
from tasks import base, segmentation
from tasks.segmentation import Runner, Segmentation, pseudo_collate


def plain_runner(adapter: Segmentation, batches: Any, work_dir: Path, total: int, hooks: tuple = ()) -> Runner:
    """Upstream's Runner as its config has it - optimizer, poly policy, hooks - for `total` iterations on `batches`.

    Checkpoints are left out, and `hooks` come on top. The weights are drawn from the seed of the adapter's recipe.
    """
    config = adapter.upstream.copy()
    rates = {"lr": base.base_lr(adapter.cfg), "weight_decay": base.weight_decay(adapter.cfg)}
    config.optim_wrapper.optimizer.update(rates)
    config.param_scheduler[0].end = total
    config.default_hooks.pop("checkpoint")
    validation = segmentation.streets(adapter.data, "val", adapter.upstream)
    with segmentation.quiet():
        return Runner(
            model=config.model,
            work_dir=str(work_dir),
            train_dataloader=batches,
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": total, "val_interval": total + 1},
            optim_wrapper=config.optim_wrapper,
            param_scheduler=config.param_scheduler,
            val_dataloader=DataLoader(validation, collate_fn=pseudo_collate),
            val_cfg={"type": "ValLoop"},
            val_evaluator=config.val_evaluator,
            default_hooks={**config.default_hooks, "checkpoint": None},
            custom_hooks=list(hooks),
            env_cfg=config.env_cfg,
            log_processor=config.log_processor,
            log_level="ERROR",
            default_scope="mmseg",
            randomness={"seed": adapter.cfg["seed"]},
            experiment_name=str(work_dir),
        )


def steps(recipe: Recipe, batches: int = 8) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that each make one update: the adapter's and the plain Runner's, on equal models.

    Both load from the disk in the main process; `recipe` is to have a budget that neither will reach.
    """
    device = torch.device("cpu")
    adapter = Segmentation(recipe.cfg, recipe.data, device)  # type: ignore[arg-type]
    session = Session(recipe, recipe.total, World(), device)
    adapter.build(session)
    ours = segmentation._Loop(adapter.runner, session.loader(adapter.dataset, pseudo_collate), session)
    batch = recipe.cfg["task"]["batch_size"]
    source = DataLoader(adapter.dataset, batch, shuffle=True, drop_last=True, collate_fn=pseudo_collate)
    plain = plain_runner(adapter, source, recipe.cell.directory / "plain", session.total)
    loop = plain.train_loop
    loop.run = lambda: None
    plain.train()  # builds all that it needs, and makes no step
    plain.call_hook("before_train")
    plain.call_hook("before_train_epoch")
    plain.model.train()
    return ours.step, lambda: loop.run_iter(next(loop.dataloader_iterator))
