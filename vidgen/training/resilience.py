"""Stopping well."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from vidgen.config import ConfigError
from vidgen.parallel import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOCK = "lock"  # file of a workdir
PATIENCE = 120.0  # seconds that a process which is started again waits for the lock
# Seconds after the first signal from which on another one means at once. What comes sooner is the same wish told by
# several: who signals a whole group reaches each process, and so do the launchers among them, which pass it on.
APART = 5.0
AT_ONCE = 5.0  # seconds that a program has to end by itself after that one


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a flag that the loop asks for; a later one ends the program.

    One that comes within 5 s of the first says nothing new: whoever signals all processes of a run, its launchers too,
    is heard several times by each.

    All three ask to save and end. The exit status, 128 + the signal, says which one it was: a cluster sends SIGUSR1
    before the time is up, and what started the run then starts it again (launch/slurm.sh).

    Python's handlers wait while the main thread is in the compiler, in a collective or on a disk that hangs. So a
    thread hears of each signal too, at once, and ends the process where the main thread can't: after `grace` seconds,
    5 s after the later signal, and on the first one where `nothing_to_lose` says so. At a Python prompt or in a
    notebook the process is the user's: there it is left alone, and what has nothing to lose raises KeyboardInterrupt.

    Used as a context; outside the main thread, where Python allows no handlers (a notebook's worker), it does nothing.

    Attributes:
      name: of the first signal; empty where none has come.
      nothing_to_lose: whether all that was done so far is done again in no time or lies on disk, as at the start and
        in the first compilation: the program then ends on the first signal. Set by the loop; False unless it does.
    """

    def __init__(self, grace: float = 0.0) -> None:
        """`grace`: seconds after the first signal at which the process ends, saved or not; 0: it may take its time."""
        self.name = ""
        self.nothing_to_lose = False
        self._grace = grace
        self._handled = self._heard = 0  # signals: by the main thread, and by the one that listens
        self._insisted = False  # whether one came well after the first
        self._before: dict[signal.Signals, object] = {}
        self._woken = -1
        self._listener: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return bool(self.name)

    @property
    def number(self) -> int:
        """Of the signal that asks to stop; 0 where none has come."""
        return signal.Signals[self.name].value if self.requested else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        self.name = self.name or signal.Signals(number).name
        # When it came only the thread that listens can tell: the main one may have been away. It is a moment behind.
        until = time.monotonic() + 1.0
        while self._heard < self._handled and time.monotonic() < until:
            time.sleep(0.001)
        if self._insisted or (self.nothing_to_lose and of_the_user()):
            self._restore()
            raise KeyboardInterrupt

    def _listen(self, heard: int) -> None:
        """Reads the numbers of signals that come, a byte each, until the pipe is closed; ends the process in time."""
        until, why, first = float("inf"), "", 0.0
        ready = select.poll()
        ready.register(heard, select.POLLIN)
        while True:
            wait = None if until == float("inf") else max(until - time.monotonic(), 0.0) * 1000
            if not ready.poll(wait):
                _end(signal.Signals[self.name], why)
            numbers = os.read(heard, 64)
            if not numbers:
                os.close(heard)
                return
            for number in numbers:
                if number not in SIGNALS:
                    continue
                now, again = time.monotonic(), self._heard > 0
                first = first if again else now
                self.name = self.name or signal.Signals(number).name
                self._insisted = self._insisted or now - first >= APART
                self._heard += 1
                if again and not self._insisted:
                    continue
                if again:
                    why, left = "stopped", AT_ONCE
                elif self.nothing_to_lose:
                    why, left = "stopping at once: nothing has been done that is not saved", 0.0
                else:
                    _say(self.name, "stopping after a step and saving; once more to stop at once")
                    why = f"not saved within {self._grace:g} s, and stopped; what was saved before stands"
                    left = self._grace or float("inf")
                until = float("inf") if of_the_user() else min(until, now + left)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard, told = os.pipe()
            os.set_blocking(told, False)
            self._listener = threading.Thread(target=self._listen, args=(heard,), daemon=True, name="signals")
            self._listener.start()
            self._told, self._woken = told, signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._listener:
            signal.set_wakeup_fd(self._woken)
            os.close(self._told)
            self._listener.join()
            self._listener = None


class Interrupted(Exception):
    """A stop was asked for in the middle of something long that can be left: `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Breaks:
    """Called between the batches of something long that all processes do: raises Interrupted if any is asked to stop.

    Raises it on all of them at the same batch, one after that in which a process was asked; see `processes.Pulse`. One
    object serves one time through: an evaluation, or a drawing of samples.
    """

    def __init__(self, stop: StopSignal):
        self._stop, self._pulse = stop, processes.Pulse(1)

    def __call__(self) -> None:
        if told := int(self._pulse(self._stop.number).max()):
            raise Interrupted(told)


def of_the_user() -> bool:
    """Whether the process is a Python prompt or a notebook, which outlives what runs in it."""
    return hasattr(sys, "ps1")


def _say(name: str, text: str) -> None:
    # Not print, which the signal may have interrupted.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{name}: {text}\n".encode())


def _end(number: signal.Signals, why: str) -> None:
    _say(number.name, why)
    os._exit(128 + number)


def started_again() -> bool:
    """Whether launch/supervise.py or Slurm has started this process in the place of one that ended."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("VIDGEN_RESTARTS", "SLURM_RESTART_COUNT"))


@contextlib.contextmanager
def only_one(workdir: str) -> Iterator[None]:
    """Makes the workdir and holds WORKDIR/lock while inside, its own number written in it.

    Raises ConfigError if another process holds it: at once where a person has started this one. Where it is started
    again, what went before may be dying still, on a disk that hangs: then Restartable, when PATIENCE seconds are over.
    """
    until = time.monotonic() + PATIENCE * started_again()
    path = os.path.join(workdir, LOCK)
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = open(path, "a", encoding="ascii")  # noqa: SIM115 - closed below
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that can be written") from e
    told, text = False, f"{workdir}: another vidgen is at work there"
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    kind = processes.Restartable if started_again() else ConfigError
                    raise kind(f"{text}; wait for it or stop it") from None
                if not told:
                    told = True
                    print(f"{text}; waiting up to {PATIENCE:g} s for it to end", file=sys.stderr, flush=True)
            except OSError as e:
                raise ConfigError(f"{path}: {e.strerror or e}; expected a disk on which files can be locked") from e
            time.sleep(0.5)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def claim(workdir: str) -> tuple[int, int] | None:
    """Which WORKDIR/lock is there now, by its place on the disk; None: there is none. Raises OSError where the disk
    does not say.
    """
    try:
        found = os.stat(os.path.join(workdir, LOCK))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


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
