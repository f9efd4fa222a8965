"""A line on stderr that says how far a long job is, and when it ends."""

from __future__ import annotations

import sys
import time


class Progress:
    """`update` as often as you like; it writes twice a second on a terminal, every half minute into a log."""

    def __init__(self, label: str, total: float):
        self._label, self._total = label, total
        self._tty = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + (0.5 if self._tty else 30.0)

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.5 if self._tty else 30.0)
        share = min(done / self._total, 1.0) if self._total else 1.0
        left = (now - self._began) * (1 - share) / share if share else 0.0
        eta = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}" if share else "?"
        line = f"{self._label} {100 * share:3.0f} % · {note} · {eta} left"
        print(f"\r\033[K{line}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
