"""Budgets: an amount with a unit, resolved once to one integer T, or to seconds of a training clock.

    Budget("5%").iterations(full)      # of the recipe's full run
    Budget("900it")  "12ep"  "1.2e6im"  # iterations, epochs, images or clips
    Budget("45min")  "90s"  "1.5h"  "8gpuh"    # the clock: elapsed training seconds
    Budget("3e17flop")                  # training FLOPs, by the cost of one iteration

One iteration is one optimizer update of the global batch.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction

from budgeted.errors import UserError

UNITS = ("%", "it", "ep", "im", "s", "min", "h", "gpuh", "flop")
CLOCK_SECONDS = {"s": 1, "min": 60, "h": 3600, "gpuh": 3600}
MOST_ITERATIONS = 10**12  # beyond it a run would take longer than anyone waits
LEAST = Fraction(1, 10**100)  # beyond it, and beyond its inverse, a float would be 0 or overflow
FORMS = "an amount such as 5%, 900it, 12ep, 1.2e6im, 90s, 45min, 1.5h, 8gpuh or 3e17flop"

# The amount as written names a directory: no spaces, and no dot ahead, which would hide it. ASCII digits, and few
# enough for Python to convert.
_AMOUNT = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?)(%|[a-zA-Z]*)")


@dataclass(frozen=True)
class Epoch:
    """How samples make epochs: `samples` in the training set, `batch` of them (globally) an iteration.

    `last` says what becomes of an epoch's remainder: "drop" leaves it out, "keep" makes a smaller batch of it,
    "carry" starts the next epoch in the middle of a batch.
    """

    samples: int
    batch: int
    last: str = "drop"

    @property
    def iterations(self) -> Fraction:
        """Iterations in one epoch; a fraction where the remainder is carried."""
        exact = Fraction(self.samples, self.batch)
        return exact if self.last == "carry" else Fraction(math.ceil(exact) if self.last == "keep" else int(exact))

    def position(self, step: int) -> int:
        """The position in the endless sample stream at which iteration `step` starts (epoch * samples + offset)."""
        if self.last == "carry":
            return step * self.batch
        epoch, offset = divmod(step, int(self.iterations))
        return epoch * self.samples + offset * self.batch

    def positions(self, step: int) -> range:
        """The positions that make up iteration `step`."""
        start = self.position(step)
        if self.last != "keep":
            return range(start, start + self.batch)
        return range(start, min(start + self.batch, (start // self.samples + 1) * self.samples))

    def seen(self, step: int) -> int:
        """Samples trained on in the first `step` iterations."""
        if self.last == "keep":
            return self.position(step)
        return step * self.batch


@dataclass(frozen=True)
class Budget:
    """An amount as written. Raises UserError when it is not a positive number with a known unit."""

    amount: str

    def __post_init__(self) -> None:
        self._parse()

    def _parse(self) -> tuple[Fraction, str]:
        return _parsed(str(self.amount))

    @property
    def value(self) -> Fraction:
        return self._parse()[0]

    @property
    def unit(self) -> str:
        return self._parse()[1]

    @property
    def is_clock(self) -> bool:
        """Does the wall clock decide when it ends?"""
        return self.unit in CLOCK_SECONDS

    def iterations(
        self, full: int | None = None, epoch: Epoch | None = None, flop_per_iteration: float | None = None
    ) -> int:
        """T, at least 1 for a percentage: max(1, round(fraction * full)), never truncated to epochs.

        `full`: iterations of the recipe's full run, for %. `epoch`: for ep and im. `flop_per_iteration`: for flop.
        Raises UserError when the amount comes to no iteration, to more than 10^12, or needs what is not given.
        """
        value, unit = self._parse()
        if unit == "it":
            if value.denominator != 1:
                raise UserError(f"budget.amount={self.amount}: iterations are whole numbers")
            exact = value
        elif unit == "%":
            exact = max(Fraction(1), value / 100 * _given(full, self.amount, "the full run's iterations, full=,"))
        elif unit == "ep":
            exact = value * _given(epoch, self.amount, "the data set, epoch=Epoch(samples, batch),").iterations
        elif unit == "im":
            data = _given(epoch, self.amount, "the data set, epoch=Epoch(samples, batch),")
            exact = value / data.samples * data.iterations if data.last == "keep" else value / data.batch
        elif unit == "flop":
            exact = value / Fraction(
                _given(flop_per_iteration, self.amount, "the cost of one iteration, flop_per_iteration=,")
            )
        else:
            raise UserError(f"budget.amount={self.amount}: a clock budget has no fixed number of iterations")
        if exact > MOST_ITERATIONS:
            raise UserError(f"budget.amount={self.amount}: {float(exact):.3g} iterations is more than 1e12")
        if round(exact) < 1:
            raise UserError(f"budget.amount={self.amount}: comes to {float(exact):.2g} iterations, less than one")
        return round(exact)

    def seconds(self, gpus: int = 1) -> float:
        """Training seconds of a clock budget; GPU-hours are shared by `gpus` devices."""
        value, unit = self._parse()
        share = gpus if unit == "gpuh" else 1
        return float(value * CLOCK_SECONDS[unit] / share)


@functools.cache
def _parsed(amount: str) -> tuple[Fraction, str]:
    match = _AMOUNT.fullmatch(amount)
    if not match and re.fullmatch(r"\.[0-9].*", amount):
        raise UserError(f"budget.amount={amount}: write 0{amount} ({FORMS})")
    if not match:
        raise UserError(f"budget.amount={amount}: not an amount; write {FORMS}")
    number, unit = match.groups()
    if unit not in UNITS:
        wrong = f"unknown unit {unit!r}" if unit else "no unit"
        # As "epochs", "sec" and "minutes" do, what is written out begins with one of ours.
        word = unit.lower().replace("step", "it").replace("sample", "im")
        near = max((u for u in UNITS if word.startswith(u)), key=len, default=None)
        raise UserError(f"budget.amount={amount}: {wrong}; write {f'{number}{near}, or ' if near else ''}{FORMS}")
    value = Fraction(number)
    if value <= 0:
        raise UserError(f"budget.amount={amount}: must be positive")
    if not LEAST < value < 1 / LEAST:
        raise UserError(f"budget.amount={amount}: out of any reach; write {FORMS}")
    return value, unit


def full_iterations(full: str, epoch: Epoch) -> int:
    """Iterations of the full run, given as `100ep`, `90000it` or `1.2e6im`."""
    return Budget(full).iterations(epoch=epoch)


def _given(value, amount: str, what: str):
    if value is None:
        raise UserError(f"budget.amount={amount}: needs {what} to become iterations")
    return value
