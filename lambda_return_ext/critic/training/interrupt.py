"""Stopping a run from outside without losing work."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved before it did.

    Args:
        signal_number: SIGINT or SIGTERM.
        step: the last step of the run, which is saved.
    """

    def __init__(self, signal_number: int, step: int):
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved: --resume goes on from there")
        self.signal_number = signal_number


class StopRequest:
    """Within this context the first SIGINT or SIGTERM only asks to stop; a second one does what it always does.

    Attributes:
        received: the number of the signal, 0 until one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.received = number
