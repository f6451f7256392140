"""Budgeted training: schedules as functions of progress, budgets as one horizon, cells that never lose work.

`make`, `Budget` and `Epoch` need no torch; `BudgetedLR` imports it when it is first asked for.
"""

from __future__ import annotations

from typing import Any

from budgeted.budgets import Budget, Epoch
from budgeted.errors import UserError
from budgeted.schedules import SCHEDULES, Schedule, hold, make, warmup

__all__ = ["SCHEDULES", "Budget", "BudgetedLR", "Epoch", "Schedule", "UserError", "hold", "make", "warmup"]


def __getattr__(name: str) -> Any:
    if name == "BudgetedLR":
        from budgeted.scheduler import BudgetedLR

        return BudgetedLR
    raise AttributeError(f"module 'budgeted' has no attribute {name!r}")
