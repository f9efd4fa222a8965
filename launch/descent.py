"""Processes that end with those that started them: for the scripts beside this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # of Linux's prctl
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def bound() -> Callable[[], None]:
    """What a child does before it becomes its program, so that it is killed when this process is gone; for
    `subprocess.Popen(preexec_fn=…)`, from the main thread. Nothing but on Linux.
    """
    parent = os.getpid()

    def bind() -> None:
        if _libc:
            _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # gone before that
                os._exit(128 + signal.SIGKILL)

    return bind


def adopt() -> None:
    """From now on a process whose parents are gone, all of them started by this one, is a child of this one."""
    if _libc:
        _libc.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(of: int) -> list[int]:
    """The children of a process, and theirs, that have not ended; none where there is no /proc."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in brackets, may hold anything.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(stat.parent.name)] = int(parent)
    found, new = set(), {of}
    while new := {pid for pid, parent in parents.items() if parent in new} - found:
        found |= new
    return sorted(found)


def end_all(group: int, seconds: float = 10.0) -> None:
    """Kills the processes of a group and all descendants of this one, stopped or not, and waits until they are gone."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def reap() -> None:
    """Takes leave of all children that have ended: after `Popen.wait`, which would not learn how."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
