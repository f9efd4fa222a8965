"""Runs of a sweep as processes of this machine, side by side, each with a share of its cores."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Collection, Sequence


class Local:
    """A launcher: starts processes, knows which are alive, stops them.

    A process outlives whoever started it, so a sweep whose driver was killed is taken up where it stands: a handle
    names a file that the process keeps locked.

    Attributes:
      width: processes side by side; each may use its share of the cores that this one may use.
    """

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
        handle = f"{child.pid}:{os.path.join(os.path.abspath(folder), 'job', 'lock')}"
        self._children[handle], self._slots[handle] = child, slot
        return handle

    def alive(self, handles: Collection[str]) -> set[str]:
        """Those of the handles whose processes run."""
        for handle, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[handle], self._slots[handle]
        return {handle for handle in handles if handle in self._children or _locked(handle.partition(":")[2])}

    def stop(self, handle: str) -> None:
        """Asks the process to save and end, as Ctrl-C does."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(handle.partition(":")[0]), signal.SIGTERM)

    def _share(self, pid: int, slot: int) -> None:
        """Gives a process its cores; where the system knows no such thing, all compete for all."""
        if not hasattr(os, "sched_setaffinity"):
            return
        cores = sorted(os.sched_getaffinity(0))
        share = cores[slot * len(cores) // self.width : (slot + 1) * len(cores) // self.width]
        with contextlib.suppress(OSError):  # it has ended already
            os.sched_setaffinity(pid, share or {cores[slot % len(cores)]})


def _locked(path: str) -> bool:
    """Whether another process holds the lock."""
    try:
        with open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
