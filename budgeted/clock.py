"""Where a run's time goes. The budget is training time alone: set-up, saving and evaluating are not in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from budgeted.distributed import World

_TIMES = ("elapsed", "eval_seconds", "wait_seconds", "compile_seconds")


class Clock:
    """Seconds of training (`elapsed`), evaluating, waiting for data and compiling.

    `seconds` is a clock budget's; `progress` then is the share of it that is spent, as of the last tick, in [0, 1].
    """

    def __init__(self, seconds: float | None, world: World) -> None:
        self.seconds, self.world = seconds, world
        self.elapsed = self.eval_seconds = self.wait_seconds = self.compile_seconds = 0.0
        self.progress = 0.0
        self._carried = (0.0, 0.0)  # progress and elapsed seconds that a resume began with
        self._first_step: float | None = None
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Training begins now."""
        self._mark = time.perf_counter()

    def tick(self) -> None:
        """A step is made. What the first one took longer than the second is set-up, not training."""
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        self.elapsed += spent
        if self._first_step is None:
            self._first_step = spent
        elif self._first_step > 0:
            excess = max(0.0, self._first_step - spent)
            self.compile_seconds += excess
            self.elapsed -= excess
            self._first_step = 0.0
        if self.seconds:
            self._read(self.seconds)

    def _read(self, seconds: float) -> None:
        """Bring the progress up to date: rank 0's, on every rank, without a first step not yet judged."""
        counted = self.elapsed - (self._first_step or 0.0)
        before, at = self._carried  # GPU-hours may have been spent on another number of GPUs
        self.progress = min(1.0, before + (self.world.agree(counted) - at) / seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - start

    @contextmanager
    def measured(self, kind: str) -> Iterator[None]:
        """Add the time inside to `eval_seconds` or `wait_seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, kind, getattr(self, kind) + time.perf_counter() - start)

    def state(self) -> dict[str, float]:
        """For a checkpoint. A first step not yet judged may be all compiling: a resume must not count it."""
        unjudged = self._first_step or 0.0
        own = {name: getattr(self, name) for name in _TIMES}
        return own | {"elapsed": self.elapsed - unjudged, "compile_seconds": self.compile_seconds + unjudged}

    def restore(self, state: dict[str, float], progress: float) -> None:
        """Go on from there. Raises KeyError or TypeError for what is no such state."""
        for name in _TIMES:
            setattr(self, name, state[name] + 0.0)
        self.progress = progress + 0.0
        self._carried = self.progress, self.elapsed
