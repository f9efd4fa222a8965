"""Stopping well."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop asks for; the second one ends the program.

    Used as a context; outside the main thread, where Python allows no handlers (a notebook's worker), it does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            self._restore()
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
