"""Stopping well."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from vidgen.config import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOCK = "lock"  # file of a workdir


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a flag that the loop asks for; the second one ends the program.

    All three ask to save and end. The exit status, 128 + the signal, says which one it was: a cluster sends SIGUSR1
    before the time is up, and what started the run then starts it again (launch/slurm.sh).

    Used as a context; outside the main thread, where Python allows no handlers (a notebook's worker), it does nothing.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return bool(self.name)

    @property
    def number(self) -> int:
        """Of the signal that asks to stop; 0 where none has come."""
        return signal.Signals[self.name].value if self.requested else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            self._restore()
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        # Not print, which the signal may have interrupted.
        os.write(2, f"\n{self.name}: stopping after a step and saving; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


@contextlib.contextmanager
def only_one(workdir: str) -> Iterator[None]:
    """Makes the workdir and holds WORKDIR/lock while inside, its own number written in it.

    Raises ConfigError if another process holds it.
    """
    path = os.path.join(workdir, LOCK)
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = open(path, "a", encoding="ascii")  # noqa: SIM115 - closed below
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that can be written") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{workdir}: another vidgen is at work there; wait for it or stop it") from None
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror or e}; expected a disk on which files can be locked") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def holder(workdir: str) -> int | None:
    """The process of this machine that is in `only_one` of a workdir; None: there is none; 0: it has not said yet."""
    try:
        with open(os.path.join(workdir, LOCK), encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0)
    except OSError:
        pass
    return None
