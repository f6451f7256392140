"""A plain PyTorch loop on the model and data of a cell: what the native loop is measured against.

torchvision and pytorchvideo have no trainer in their packages; this is the loop that their examples write out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from budgeted.distributed import World
from budgeted.recipe import Recipe
from budgeted.session import Session
from tasks import base


def steps(recipe: Recipe) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that each make one update: the adapter's and a plain loop's, on equal models and data."""
    device = torch.device("cpu")
    adapter: Any = base.adapter_of(recipe.cfg)(recipe.cfg, recipe.data, device)
    session = Session(recipe, recipe.total, World(), device)
    adapter.build(session)
    batches = session.loader(adapter.dataset)
    model = adapter.make_model().train()
    optimizer = base.build_optimizer(recipe.cfg, base.decay_groups(model, adapter.norm_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / session.total)
    source = _endless(DataLoader(adapter.dataset, recipe.cfg["task"]["batch_size"], shuffle=True, drop_last=True))

    def plain() -> None:
        x, y = adapter._to_device(next(source))
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()  # a loop that logs looks at its loss; ours is logged at every step of a tiny task

    return lambda: adapter.step(session, batches), plain


def _endless(source: DataLoader) -> Iterator[Any]:
    while True:
        yield from source
