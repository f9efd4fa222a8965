"""Where each second of a run's life went, over all its attempts: WORKDIR/goodput.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vidgen import lines
from vidgen.training.journal import Journal, complain

FILE = "goodput.jsonl"
KINDS = ("init", "compile", "step", "data wait", "save", "eval", "sample", "lost", "down")
OWN = ("lost", "down")  # of these, what isn't measured but found out at the next start
EVERY = (1.0, 10.0)  # seconds between rows, of a young attempt and of an old one: a death leaves so much unknown
LOADING = 600.0  # seconds: a process that began earlier has done something else before

_OFFSET = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970, which no one sets back while the process lives."""
    return _OFFSET + time.monotonic()


def began() -> float:
    """When this process did, where the system says so and it was to train: Python's own start is part of a run's."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as f:
            ticks = int(f.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as f:
            age = float(f.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        age = 0.0
    return now() - (age if 0 <= age < LOADING else 0.0)


@dataclasses.dataclass
class Attempt:
    """One process's share of a run.

    Attributes:
      start: seconds since 1970.
      end: of what is known of it, alike.
      seconds: kind → seconds; together they are the time from the end of the attempt before to the end of this one.
      first: the step that it went on from.
      last: the last step that it is known to have taken.
      finished: whether the run was at its end with it; what time there is until somebody goes on all the same is no
        part of the run's life.
    """

    start: float
    end: float
    seconds: dict[str, float]
    first: int = 0
    last: int = 0
    finished: bool = False


class Account:
    """Adds up the rows of the ledger. The same for one that is being written and one that is read."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()):
        self.attempts: list[Attempt] = []
        self.measured: dict[str, float] = {}  # by the last attempt itself, seconds that were lost among the steps'
        self.on_disk = 0  # a step of which a checkpoint has been there for certain
        self._saving = 0  # one that is perhaps not there yet
        self._at = 0  # the step from which the next ones count
        self._under_way = 0.0  # seconds of the step after it
        self._runs: list[tuple[int, int, float, int]] = []  # (after step, to step, seconds, attempt): what counts
        for row in rows:
            self.take(row)

    def take(self, row: dict[str, Any]) -> None:
        """Adds a row, oldest first."""
        if "start" in row:
            self._begin(float(row["start"]))
        if not self.attempts:
            return
        attempt = self.attempts[-1]
        self._measure(attempt, row)
        if row.get("saved"):  # it has begun, and the one before has ended
            self.on_disk, self._saving = max(self.on_disk, self._saving), self._at
        if "resumed" in row:
            attempt.first = attempt.last = int(row["resumed"])
            self.on_disk, self._saving = attempt.first, 0  # what a rollback leaves is known again
            self._back_to(attempt.first)
        attempt.finished |= bool(row.get("finished"))

    def seconds(self) -> dict[str, float]:
        """By kind, over all attempts."""
        return {kind: sum(attempt.seconds[kind] for attempt in self.attempts) for kind in KINDS}

    def _begin(self, start: float) -> None:
        before = self.attempts[-1] if self.attempts else None
        seconds = dict.fromkeys(KINDS, 0.0)
        if before and not before.finished:
            seconds["down"] = max(0.0, start - before.end)
            self._lose(-1, self._under_way)
        self._under_way, self._saving = 0.0, 0
        self.attempts.append(Attempt(start, start, seconds))
        self.measured = dict.fromkeys(KINDS, 0.0)

    def _measure(self, attempt: Attempt, row: dict[str, Any]) -> None:
        measured = {kind: float(s) for kind, s in row.get("seconds", {}).items() if kind in KINDS and kind not in OWN}
        for kind, s in measured.items():
            attempt.seconds[kind] += s - self.measured[kind]
        self._under_way += measured.get("step", self.measured["step"]) - self.measured["step"]
        self.measured |= measured
        attempt.end = max(attempt.end, float(row.get("time", attempt.end)))
        n = int(row.get("step", self._at))
        if n > self._at:
            self._runs.append((self._at, n, self._under_way, len(self.attempts) - 1))
            self._at, self._under_way, attempt.last = n, 0.0, n
        if row.get("saved") and self._runs and self._runs[-1][1] == self._at:
            after, to, seconds, which = self._runs[-1]  # the device was still at it when the step was counted
            self._runs[-1] = after, to, seconds + self._under_way, which
            self._under_way = 0.0

    def _back_to(self, step: int) -> None:
        """What was done after `step` was in vain."""
        self._lose(-1, self._under_way)
        while self._runs and self._runs[-1][1] > step:
            after, to, seconds, which = self._runs.pop()
            kept = seconds * max(0, step - after) / (to - after)
            self._lose(which, seconds - kept)
            if after < step:
                self._runs.append((after, step, kept, which))
        self._at, self._under_way = step, 0.0

    def _lose(self, which: int, seconds: float) -> None:
        self.attempts[which].seconds["step"] -= seconds
        self.attempts[which].seconds["lost"] += seconds


class Ledger:
    """Writes down where the time goes, while it goes; one process of a run does.

    Time inside of `spent` is of the kind that it names; the rest is init until the first batch is there, and step from
    then on. A row tells the sums since the attempt's start, so that one that is missing costs nothing; a death's last
    seconds, which no row knows, are taken for down time.
    """

    def __init__(
        self,
        workdir: str,
        clock: Callable[[], float] = now,
        start: float | None = None,
        say: Callable[[str], None] = complain,
    ):
        """Begins an attempt.

        Args:
          workdir: that exists, and that nobody else writes to; empty: nothing is read or written.
          clock: seconds since 1970.
          start: of the attempt; None: of this process, where that was not long ago.
          say: is told of a disk that refuses.
        """
        self._clock = clock
        self._account = Account(read(workdir) if workdir else ())
        before = self._account.attempts[-1].end if self._account.attempts else 0.0
        started = began() if start is None else start
        self._mark = self._row_at = min(max(started, before), clock())
        self._spent = dict.fromkeys((kind for kind in KINDS if kind not in OWN), 0.0)
        self._base, self._inside = "init", []
        self._step: int | None = None
        self._journal = Journal(os.path.join(workdir, FILE), say=say) if workdir else None
        self._row(start=self._mark)

    @property
    def on_disk(self) -> int:
        """A step of which an attempt before this one has certainly left a checkpoint; 0: of none."""
        return self._account.on_disk

    def resumed(self, step: int) -> None:
        """The attempt goes on after `step`: at its start, and when it rolls back. What was done beyond is lost."""
        self._charge()
        self._row(resumed=step)
        self._step = step

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Time inside is of this kind, one of KINDS; where another one stands inside, that time is of the inner kind.

        Raises ValueError for another kind.
        """
        if kind not in self._spent:
            raise ValueError(f"a ledger has no kind {kind!r}; expected one of {', '.join(self._spent)}")
        self._charge()
        self._inside.append(kind)
        done = False
        try:
            yield
            done = True
        finally:
            self._charge()
            self._inside.pop()
            if kind == "data wait":
                self._base = "step"
            if kind == "save" and done:  # a run goes on from there
                self._row(saved=True)

    def step(self, n: int) -> None:
        """Step n was taken; call it after each, and before its checkpoint is saved."""
        self._charge()
        self._base, self._step = "step", n
        age = self._mark - self._account.attempts[-1].start
        if self._mark - self._row_at >= min(EVERY[0] + age / 100, EVERY[1]):
            self._row()

    def finished(self) -> None:
        """The run is at its end: if somebody goes on with it later, the time until then doesn't count as down."""
        self._charge()
        self._row(finished=True)
        self._base = "save"  # closing is no step

    def summary(self) -> dict[str, float]:
        """Seconds by kind over all attempts up to now, "total", "attempts", and "goodput": the share, 0 to 1, of
        steps that count in the time since the run first began."""
        self._charge()
        seconds = self._account.seconds()
        for kind, s in self._spent.items():
            seconds[kind] += s - self._account.measured[kind]  # since the last row
        return totals(seconds) | {"attempts": len(self._account.attempts)}

    def close(self) -> None:
        """Writes how it stands; the ledger can't be used after."""
        self._charge()
        self._row()
        if self._journal:
            self._journal.close()

    def _charge(self) -> None:
        """What has passed since the last call was of the kind that it was in."""
        then, self._mark = self._mark, max(self._clock(), self._mark)
        self._spent[self._inside[-1] if self._inside else self._base] += self._mark - then

    def _row(self, **more: Any) -> None:
        row = {"time": round(self._mark, 3), "attempt": len(self._account.attempts) + ("start" in more)}
        if self._step is not None:
            row["step"] = self._step
        row |= {"seconds": {kind: round(s, 3) for kind, s in self._spent.items() if s}} | more
        self._account.take(row)
        self._row_at = self._mark
        if self._journal:
            self._journal.append((json.dumps(row) + "\n").encode())


def totals(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by kind, with their sum as "total" and the share of steps that count as "goodput"."""
    total = sum(seconds.values())
    return seconds | {"total": total, "goodput": seconds["step"] / total if total > 0 else 0.0}


def read(workdir: str) -> list[dict[str, Any]]:
    """The rows of WORKDIR/goodput.jsonl, oldest first; what a kill or a bad disk left of one is passed over."""
    rows = []
    for row in lines.read(os.path.join(workdir, FILE)):
        try:
            Account([{"start": 0.0}, row])  # whether it can be taken
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        rows.append(row)
    return rows
