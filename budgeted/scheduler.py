"""The one writer of learning rates."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from budgeted.schedules import Schedule


class BudgetedLR(LRScheduler):
    """Applies `schedule(t/T)` to every parameter group before update t, and the momentum where it moves.

    In a plain loop it is stepped like torch's own schedulers, after each update:

        scheduler = BudgetedLR(optimizer, make("linear"), T)     # sets the rate of update 0
        for t in range(T):
            ...; optimizer.step(); scheduler.step()              # sets the rate of update t + 1

    A trainer that knows its step calls `set_step(t)` before update t. For a clock budget give `progress`, a
    function without arguments that returns elapsed/budget, in place of T. `applied[t]` is the ratio that was
    set for update t in this process, NaN for those before a resume. The last update uses f((T-1)/T); stepping once
    more asks for f(1), harmless. Groups that have no momentum, or one of 0, are left without.

    Raises ValueError for a `total` that is no positive number of iterations, for a schedule that is no function, and
    for one that moves the momentum of an optimizer that averages by it (Schedule-Free).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | Callable[[float], float],
        total: int | None = None,
        progress: Callable[[], float] | None = None,
    ) -> None:
        if (total is None) == (progress is None) or not (total is None or _is_count(total)):
            given = f"total={total!r}, progress={progress!r}"
            raise ValueError(
                f"give either total, a number of iterations (see Budget), or progress, a function; got {given}"
            )
        if not callable(getattr(schedule, "factor", schedule)):
            raise ValueError(f"{schedule!r} is no schedule: make({schedule!r}) may be meant")
        self.optimizer = optimizer
        self.total = total
        self.schedule = schedule
        self._factor = getattr(schedule, "factor", schedule)
        self._momentum = getattr(schedule, "momentum_at", None)
        if self._momentum is not None and "schedulefree" in type(optimizer).__module__:
            raise ValueError(f"the schedule moves the momentum, by which {type(optimizer).__name__} averages")
        self._clock = progress
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._has_momentum = [bool(g["momentum"]) if "momentum" in g else "betas" in g for g in optimizer.param_groups]
        self.applied = array("d")
        self.last_epoch = 0
        self._step_count = 1  # torch's own schedulers count this; some trainers read it
        self.set_step(0)

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next update, or of update `epoch`."""
        self.set_step(self.last_epoch + 1 if epoch is None else epoch)

    def set_step(self, t: int) -> None:
        """Set the rates of update t (0-based)."""
        self.last_epoch = t
        self.progress = p = min(t / self.total, 1.0) if self.total else min(self._clock(), 1.0)  # type: ignore[misc]
        self.ratio = ratio = self._factor(p)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            lr = group["lr"]
            if isinstance(lr, torch.Tensor):
                lr.fill_(base * ratio)
            else:
                group["lr"] = base * ratio
        if self._momentum is not None:
            self._set_momentum(self._momentum(p))
        missing = t + 1 - len(self.applied)
        if missing > 0:  # more than one after a resume
            self.applied.extend([math.nan] * missing)
        self.applied[t] = ratio

    def _set_momentum(self, value: float) -> None:
        for group, has in zip(self.optimizer.param_groups, self._has_momentum, strict=True):
            if not has:
                continue
            if "momentum" in group:
                group["momentum"] = value
            else:
                group["betas"] = (value, *group["betas"][1:])

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The rate in force, one per parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_epoch, "total": self.total, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved step. Raises ValueError when it was saved under another budget."""
        if state_dict["total"] != self.total:
            raise ValueError(f"saved under a budget of {state_dict['total']} iterations, this one has {self.total}")
        self.base_lrs = list(state_dict["base_lrs"])
        self.set_step(state_dict["step"])


def _is_count(total: Any) -> bool:
    try:
        return operator.index(total) >= 1
    except TypeError:
        return False
