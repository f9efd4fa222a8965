"""Signs of life: each process writes down how far it is, and ends when nothing has moved for too long."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from vidgen.parallel.processes import RESTART

FOLDER = "heartbeats"  # of a workdir
SLOW = 10  # times as long may pass at the start, in a compilation or a save, and the first time of anything else
ALIVE = 2.0  # seconds after which a file is written again though nothing has moved
LOST = 4 * ALIVE  # and after which a file that isn't means that its process is stopped, or gone

Phase = Literal["start", "compile", "step", "save", "eval", "sample"]


class Watchdog:
    """Watches over the loop of this process from threads of their own; a context.

    WORKDIR/heartbeats/rank-N.json says where the process is: {"process", "of", "host", "pid", "step", "phase", "moved",
    "alive", "slow", "failed"}; "moved" is when the loop was last heard of and "alive" when the file was written, in
    seconds since 1970, and "slow" whether ten times the usual may pass before it moves again. It is written once a
    second at most; a disk that is full or hangs stops the writing and nothing else. When the context ends, its phase is
    "ended", and "failed" says whether by an exception.

    If nothing moves for `hang` seconds, ten times as long while this process or another one is in a phase that
    compiles, the process prints the stacks of its threads, says who waits and who is missing, and ends with status 75,
    though the main thread may be in a collective that never returns. One whose file is no longer written is stopped,
    and not waited for. Time during which the whole process was stopped doesn't count.
    """

    def __init__(self, workdir: str, hang: float, end: Callable[[int], Any] = os._exit):
        """`hang`: seconds; 0: it may take its time. `end` is called with the exit status."""
        self._folder = os.path.join(workdir, FOLDER)
        self._hang, self._end = hang, end
        self._who = {"process": jax.process_index(), "of": jax.process_count()}
        self._who |= {"host": socket.gethostname(), "pid": os.getpid()}
        self._beat: tuple[int, str] = (0, "start")
        self._failed = False
        self._last, self._moved, self._waited = self._beat, time.time(), 0.0
        self._excused = 0.0  # of what was waited, up to when something compiled
        self._been: set[str] = set()  # phases that were left
        self._over = threading.Event()
        self._tick = min(1.0, hang / 10) if hang else 1.0
        self._threads = [threading.Thread(target=t, daemon=True, name=t.__name__) for t in (self._watch, self._tell)]

    def beat(self, step: int, phase: Phase) -> None:
        """Says that the loop goes on: it is at `step` and now does `phase`. It costs nothing: call it often."""
        self._beat = (step, phase)

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self.beat(self._beat[0], "ended")  # type: ignore[arg-type]
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=ALIVE)  # one may be at a disk that hangs

    def _slow(self) -> bool:
        """Whether the phase of the last beat compiles, or waits for a disk."""
        phase = self._last[1]
        return phase in ("start", "compile", "save") or (phase != "step" and phase not in self._been)

    def _watch(self) -> None:
        clock, peers = time.monotonic(), Peers(self._who["process"], time.time())
        while not self._over.wait(self._tick):
            passed, clock = time.monotonic() - clock, time.monotonic()
            beat = self._beat
            if beat is not self._last:
                if beat[1] != self._last[1]:
                    self._been.add(self._last[1])
                self._last, self._moved, self._waited, self._excused = beat, time.time(), 0.0, 0.0
                continue
            self._waited += min(passed, 2 * self._tick)  # not the time in which this process was stopped
            if not self._hang or self._waited < self._hang:
                continue
            if self._who["of"] > 1 and time.monotonic() - peers.looked > ALIVE:
                peers.look(self._read(), time.monotonic())
            if peers.stopped:
                self._excused = 0.0
            elif self._slow() or peers.slow:
                self._excused = self._waited
            if self._waited >= min(self._excused + self._hang, self._hang * SLOW):
                self._give_up()
                return

    def _read(self) -> dict[int, dict[str, Any]]:
        """What the files of all say; nothing where the disk hangs."""
        found: list[dict[int, dict]] = []
        reader = threading.Thread(target=lambda: found.append(read(self._folder)), daemon=True)
        reader.start()
        reader.join(ALIVE)
        return found[0] if found else {}

    def _give_up(self) -> None:
        text = missing(self._state(), self._read(), time.time())
        faulthandler.dump_traceback(file=2, all_threads=True)
        with contextlib.suppress(OSError):  # last, where a launcher shows it
            who = f"process {self._who['process']} of {self._who['of']}"
            os.write(2, f"{who}: {text}; above is what its threads do, and it ends with {RESTART}\n".encode())
        self._end(RESTART)

    def _tell(self) -> None:
        written, at, over = None, 0.0, False
        while not over:
            if self._beat is not written or time.monotonic() - at > ALIVE:
                written, at = self._beat, time.monotonic()
                self._write()
            over = self._over.wait(1.0)
        self._write()

    def _state(self) -> dict[str, Any]:
        step, phase = self._beat
        return self._who | {
            "step": step,
            "phase": phase,
            "moved": self._moved if self._beat is self._last else time.time(),
            "alive": time.time(),
            "slow": self._slow(),
            "failed": self._failed,
        }

    def _write(self) -> None:
        state = self._state()
        path = os.path.join(self._folder, f"rank-{state['process']}.json")
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, exist_ok=True)
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.write(json.dumps(state))
            os.replace(path + ".tmp", path)


class Peers:
    """What a process that waits learns of the others of its attempt from their files.

    Attributes:
      looked: when it last looked, in seconds of the monotonic clock.
      slow: whether one of them is in a phase that compiles.
      stopped: whether one of them no longer writes its file, though it has not ended and this process still writes its.
    """

    def __init__(self, own: int, began: float):
        """`began`: when the attempt did, in seconds since 1970; a file from before is of an earlier one."""
        self._own, self._began = own, began
        self._heard: dict[int, tuple[float, float]] = {}  # process → its "alive", and when it was first seen to be so
        self.looked, self.slow, self.stopped = 0.0, False, False

    def look(self, states: dict[int, dict[str, Any]], now: float) -> None:
        """Takes note of what the files say, at a time of the monotonic clock."""
        states = {process: state for process, state in states.items() if state.get("alive", 0.0) >= self._began}
        for process, state in states.items():
            if state["alive"] != self._heard.get(process, (0.0, 0.0))[0]:
                self._heard[process] = state["alive"], now
        silent = {process for process in states if now - self._heard[process][1] > LOST}  # clocks of hosts may differ
        others = {p: state for p, state in states.items() if p != self._own and state["phase"] != "ended"}
        self.looked, self.slow = now, any(state["slow"] for state in others.values())
        self.stopped = self._own in states and self._own not in silent and bool(silent & others.keys())


def read(folder: str) -> dict[int, dict[str, Any]]:
    """{process: what its file in WORKDIR/heartbeats says}; a file that can't be read is passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith("rank-") and name.endswith(".json"):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    with open(os.path.join(folder, name), encoding="utf-8") as f:
                        state = json.load(f)
                    found[int(state["process"])] = state
    return found


def missing(own: dict[str, Any], others: dict[int, dict[str, Any]], now: float) -> str:
    """Where a process waits and since when, and who of the others is missing, in one line.

    Args:
      own: of the process that waits, as its file has it.
      others: of all processes, by number, as `read` found them; of an earlier attempt where one has not begun.
      now: seconds since 1970.
    """
    text = f"nothing has moved for {now - own['moved']:.0f} s in step {own['step']} ({own['phase']})"
    told = []
    for process in range(own["of"]):
        if process == own["process"]:
            continue
        other = others.get(process)
        who = f"process {process}" + (f" (pid {other['pid']} on {other['host']})" if other else "")
        if other is None:
            told.append(f"{who} has not begun")
        elif other["phase"] == "ended":
            told.append(f"{who} has ended, after step {other['step']}")
        elif now - other["alive"] > LOST:
            ago = f"{now - other['alive']:.0f} s"
            told.append(f"{who} has shown no sign of life for {ago}, last in step {other['step']} ({other['phase']})")
        elif (other["step"], other["phase"]) != (own["step"], own["phase"]):
            ago = f"{now - other['moved']:.0f} s"
            told.append(f"{who} is in step {other['step']} ({other['phase']}) since {ago}")
    if not told and own["of"] > 1:
        told = ["all others are there and wait as well"]
    more = f"; and {len(told) - 8} more" if len(told) > 8 else ""
    return "; ".join([text, *told[:8]]) + more
