"""Runs of a sweep as processes of this machine, side by side, each with a share of its cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Sequence

from vidgen.training.resilience import holder


class Local:
    """A launcher: starts processes, knows which are alive, stops them.

    A process outlives whoever started it, so a sweep whose driver was killed is taken up where it stands. A handle is
    PID:FOLDER, and the process is in `only_one` of that folder: its number may be another's by now, the lock is not.

    Attributes:
      width: processes side by side; each may use its share of the cores that this one may use.
      pause: seconds between looks at them.
    """

    name = "local"
    pause = 1.0

    def __init__(self, width: int):
        self.width = width
        self._children: dict[str, subprocess.Popen] = {}
        self._slots: dict[str, int] = {}

    def start(self, name: str, argv: Sequence[str], folder: str) -> str:
        """Starts `argv`, its output into FOLDER/log.txt; returns its handle."""
        os.makedirs(folder, exist_ok=True)
        slot = min(set(range(self.width)) - set(self._slots.values()), default=len(self._slots) % self.width)
        with open(os.path.join(folder, "log.txt"), "ab") as log:
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._share(child.pid, slot)
        handle = f"{child.pid}:{os.path.join(os.path.abspath(folder), 'job')}"
        self._children[handle], self._slots[handle] = child, slot
        return handle

    def alive(self, handles: Collection[str]) -> set[str]:
        """Those of the handles whose processes run."""
        for handle, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[handle], self._slots[handle]
        return {h for h in handles if h in self._children or holder(h.partition(":")[2]) is not None}

    def stop(self, handle: str) -> None:
        """Asks the process to save and end, as Ctrl-C does."""
        child, folder = self._children.get(handle), handle.partition(":")[2]
        # Of two that were started for one run, by two drivers, the one that holds the lock is at work.
        pid = child.pid if child and child.poll() is None else holder(folder)
        if pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGTERM)

    def _share(self, pid: int, slot: int) -> None:
        """Gives a process its cores; where the system knows no such thing, all compete for all."""
        if not hasattr(os, "sched_setaffinity"):
            return
        cores = sorted(os.sched_getaffinity(0))
        share = cores[slot * len(cores) // self.width : (slot + 1) * len(cores) // self.width]
        with contextlib.suppress(OSError):  # it has ended already
            os.sched_setaffinity(pid, share or {cores[slot % len(cores)]})
