"""Signs of life of a run's processes, as launch/supervise.py reads them; vidgen/training/watchdog.py writes them."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import Any

SLOW = 10  # times as long may pass while a process starts or compiles
SILENT = 10.0  # seconds after which a process that writes its heartbeat every other second is stopped


class Heartbeats:
    """What the processes of one attempt say in WORKDIR/heartbeats; those of earlier attempts don't count.

    Attributes:
      seen: {file: what it says}.
      done: whether the attempt was found to be left over from a run that has come to its end.
    """

    def __init__(self, workdir: pathlib.Path, hang: float, trains: bool):
        """`trains`: there will be some, so that none at all is a hang too."""
        self._workdir, self._folder, self._hang, self._trains = workdir, workdir / "heartbeats", hang, trains
        self._before = {name: beat(state) for name, state in self._read().items()}
        self._began = self._looked = time.monotonic()
        self.seen: dict[str, dict[str, Any]] = {}
        self.done = False
        self._since: dict[str, float] = {}  # when it was first seen to say that: clocks of hosts may differ
        self._compiled = self._began  # when one was last seen to compile
        self._heard: dict[str, tuple[Any, float]] = {}  # its "alive", and when that was first seen

    def hung(self) -> str:
        """How the attempt hangs, in words; empty where it does not."""
        now = time.monotonic()
        if not self._hang or now < self._looked + 0.5:
            return ""
        self.look()
        if not self.seen:
            late = self._trains and now - self._began > SLOW * self._hang
            return f"showed no sign of life for {now - self._began:.0f} s, and was killed" if late else ""
        # One that compiles is waited for by the others too; one that is stopped, and says nothing, is not.
        lives = {name for name in self.seen if now - self._heard[name][1] < SILENT}
        slow = any(self.seen[name].get("slow") and self.seen[name]["phase"] != "ended" for name in lives)
        self._compiled = now if slow else self._compiled
        for name, state in sorted(self.seen.items()):
            waited = now - self._since[name]
            excused = self._compiled - self._since[name] if name in lives else 0.0  # of it, up to when one compiled
            if state["phase"] != "ended" and waited > min(max(excused, 0.0) + self._hang, self._hang * SLOW):
                who = f"process {state['process']} on {state.get('host', '?')}"
                return f"hung, {who} for {waited:.0f} s in step {state['step']} ({state['phase']}), and was killed"
        return ""

    def left(self) -> str:
        """How long ago all processes have ended, as they say, though what was started is still there: at a disk that
        hangs, or at a barrier of their exits. In words; empty where some have not, or it is not long ago. One that has
        ended beside others that go on is none to wait for: they end as well, or hang.
        """
        states, now = self.seen.values(), time.monotonic()
        if not self._hang or not states or any(state["phase"] != "ended" for state in states):
            return ""
        waited = now - max(self._since[name] for name in self.seen)
        if waited < self._hang or len(states) < max(state.get("of", 1) for state in states):
            return ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            steps = json.loads((self._workdir / "config.json").read_text(encoding="utf-8"))["train"]["steps"]
            self.done = furthest(self._workdir, self.seen) >= steps and not any(s.get("failed") for s in states)
        what = "came to the run's end" if self.done else "ended"
        return f"{what}, as all its processes say, was still there {waited:.0f} s later, and was killed"

    def look(self) -> None:
        """Takes note of what has changed."""
        self._looked = time.monotonic()
        for name, state in self._read().items():
            if beat(state) != self._before.get(name):
                self._before[name], self.seen[name], self._since[name] = beat(state), state, self._looked
            if name in self.seen and self._heard.get(name, ("", 0.0))[0] != state.get("alive"):
                self._heard[name] = state.get("alive"), self._looked

    def _read(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in self._folder.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                state = json.loads(path.read_text(encoding="utf-8"))
                beat(state)
                found[path.name] = state
        return found


def beat(state: dict[str, Any]) -> tuple:
    """What of a heartbeat changes when its process gets further."""
    return state["pid"], int(state["step"]), state["phase"], state["moved"], state["process"]


def furthest(workdir: pathlib.Path, seen: dict[str, dict[str, Any]]) -> int:
    """The last step that a heartbeat or a checkpoint speaks of; 0: none does."""
    steps = [int(state["step"]) for state in seen.values()]
    with contextlib.suppress(OSError):
        steps += [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps, default=0)
