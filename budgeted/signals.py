"""Signals that ask a run to stop are noted when they come, and obeyed where its state is whole."""

from __future__ import annotations

import signal
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """A signal asked the run to stop; its work is saved. Not an `Exception`: nothing should swallow it."""

    def __init__(self, number: int, handler: Any = None) -> None:
        super().__init__(128 + number)
        self.signal, self.handler = number, handler


class Signals:
    """`noted` is the signal that has come, or 0. A second SIGINT is a KeyboardInterrupt, at once."""

    def __init__(self) -> None:
        self.noted = self._interrupts = 0
        self._handlers: dict[int, Any] = {}

    def catch(self) -> None:
        """From now on, note them."""
        try:
            self._handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        except ValueError:  # not the main thread: whoever started it handles signals
            self._handlers = {}

    def _note(self, number: int, frame: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self.noted = 0
            self.release()
            raise KeyboardInterrupt
        if self.noted != signal.SIGUSR2:  # preemption sends it with others; it alone gets the job requeued
            self.noted = number

    def obey(self, number: int) -> Interrupted:
        """The error to raise for a signal, this process's or another rank's, now that all is saved."""
        self.noted = 0
        return Interrupted(number, self._handlers.get(number))

    def release(self) -> None:
        """Give them back to whoever had them."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}

    def pass_on(self) -> None:
        """Raise the signal that came too late to be obeyed, if one did, once they are released."""
        late, self.noted = self.noted, 0
        if late:
            signal.raise_signal(late)


def first_of(numbers: set[int]) -> int:
    """The one of several ranks' signals that all obey, or 0."""
    return signal.SIGUSR2 if signal.SIGUSR2 in numbers else max(numbers)
