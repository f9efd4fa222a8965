"""Runs of two processes that are killed and stopped again and again, under what starts them again.

Data workers are threads of the process that trains (Grain's own worker processes are not used), so that to kill one is
to kill its process: the signal goes to a thread other than the main one, which Linux makes the death of all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import (
    ROOT,
    config_file,
    ended_alike,
    last_step,
    local,
    make_config,
    processes,
    ranks,
    saving,
    started,
    straight,
    wait,
)

from vidgen.training import metrics

HOWS = ("rank", "coordinator", "worker", "stop")  # SIGKILL of rank 1, of rank 0, of a data thread of either; SIGSTOP
MOMENTS = ("running", "saving", "starting")
SHARES = (6, 3, 1)  # how often each moment is drawn
INTERVAL = 3.0  # seconds between temporary checkpoints
HANG = 10.0  # seconds without a step after which a run is taken to hang; ten times as long while it starts
SAVE = 0.2  # seconds, about, that a save takes
START = 10.0  # seconds, about, that a start takes
RECOVERY = 60.0  # seconds, at most
ENOUGH = 10  # losses that a median is judged on: a single one inside a save is an interval and that save's time
DEALT = 0.95  # share of the blows asked for, at least: a run may have ended before its last one
OFTEN = 3  # times that something is asked for from which on it is to have come once
PATIENCE = 400.0  # seconds that anything may take before the suite gives up on it
# Of the processes other than the first one, none can keep what it has compiled on a CPU: all of it is compiled again at
# each start, in a third of the time so.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
GOING_ON = re.compile(rb"Going on after step (\d+)|(Compiling the step)")


def trials(short: bool, seed: int) -> list[Trial]:
    """Ten runs, of ten blows each; short: one run, whose coordinator is killed in a save."""
    rng = random.Random(f"kills {seed}")
    if short:
        blow = {"how": "coordinator", "moment": "saving", "at": rng.random(), "draw": rng.random()}
        return [{"steps": 100, "blows": [blow]}]
    runs = []
    for _ in range(10):
        blows = [{"how": rng.choice(HOWS), "moment": rng.choices(MOMENTS, SHARES)[0]} for _ in range(10)]
        runs.append({"steps": 2000, "blows": [b | {"at": rng.random(), "draw": rng.random()} for b in blows]})
    return runs


def config(steps: int, hang: float = 0.0) -> Any:
    return make_config(
        **{
            "mesh.fsdp": 2,
            "mesh.data": 1,
            "train.steps": steps,
            "train.checkpoint_every": 200,
            "train.checkpoint_minutes": INTERVAL / 60,
            "train.hang": hang,
        }
    )


def supervised(workdir: pathlib.Path, file: pathlib.Path) -> list[str]:
    """The command of a run of two processes that is started again when it dies or hangs."""
    supervisor = [sys.executable, str(ROOT / "launch/supervise.py"), "--restarts=20", f"--hang={3 * HANG:g}", "--"]
    return supervisor + local(2, 1, "--", "train", "--config", file, "--workdir", workdir)[1:]


class Watch:
    """Reads how far a run is, attempt after attempt, from its log and its metrics.

    Attributes:
      begun: the step after which the present attempt went on; None where it has not said so yet.
      step: the newest that it has taken; `begun` where it has taken none.
      times: {step: when it was seen first, in seconds of the monotonic clock} of the attempts so far.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._log, self._read = workdir, workdir / "logs/rank-0.log", 0
        self.begun: int | None = None
        self.step = 0
        self.times: dict[int, float] = {}

    def struck(self) -> None:
        """What the log says up to here is of an attempt that is dead."""
        self._read, self.begun = self._log.stat().st_size if self._log.exists() else 0, None

    def look(self) -> None:
        """Reads on."""
        if self.begun is None and self._log.exists():
            with self._log.open("rb") as f:
                f.seek(self._read)
                found = GOING_ON.search(f.read())
            if found is None:
                return
            self.begun = self.step = int(found[1] or 0)
            self.times = {n: seen for n, seen in self.times.items() if n < self.begun} | {self.begun: time.monotonic()}
        if self.begun is not None and (step := last_step(self._workdir)) > self.step:
            self.step = step
            self.times[step] = time.monotonic()

    def moving(self) -> bool:
        """Whether the present attempt has taken a step."""
        self.look()
        return self.begun is not None and self.step > self.begun


@dataclasses.dataclass(frozen=True)
class Blow:
    """One that has been dealt.

    Attributes:
      how: of HOWS.
      starting: whether the attempt had taken no step yet.
      now: when, in seconds of the monotonic clock.
      step: the newest by then.
      times: when each step by then was seen first.
    """

    how: str
    starting: bool
    now: float
    step: int
    times: dict[int, float]


def strike(workdir: pathlib.Path, how: str, draw: float) -> bool:
    """Kills or stops a process of the run; whether there was one. `draw`, 0 to 1, chooses among several."""
    pids = ranks(workdir)
    rank = {"coordinator": 0, "rank": 1}.get(how, int(2 * draw))
    if rank not in pids:
        return False
    target = pids[rank]
    try:
        if how == "worker":
            threads = sorted({int(path.name) for path in pathlib.Path(f"/proc/{target}/task").iterdir()} - {target})
            os.kill(threads[int(draw * len(threads))], signal.SIGKILL)
        else:
            os.kill(target, signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    except (OSError, IndexError):
        return False
    return True


class Siege:
    """A run under its supervisor, the blows that it was dealt, and what they have cost it.

    Attributes:
      found: {"how", "inside", "starting"} of each blow, inside a save or not; {"how", "missed"} of each that struck
        nobody; {"how", "lost", "steps"} of each whose steps had to be taken again, in seconds and steps; {"how",
        "recovery"}: seconds to the first new step.
    """

    def __init__(self, workdir: pathlib.Path, process: subprocess.Popen, step_time: float):
        """`step_time`: seconds that a step takes where nothing happens."""
        self.workdir, self._process, self._step_time, self.watch = workdir, process, step_time, Watch(workdir)
        self.found: list[dict[str, Any]] = []
        self._pending: list[Blow] = []

    def over(self) -> bool:
        """Whether the supervisor has ended."""
        return self._process.poll() is not None

    def recovered(self) -> bool:
        """Whether steps are taken; if so, what the blows before have cost is known."""
        if not self.watch.moving():
            return False
        for blow in self._pending:
            if not blow.starting:
                # From the first step on that is taken again; before it an attempt may have compiled.
                again = [seen for n, seen in blow.times.items() if n > self.watch.begun]
                lost = blow.now - min(again) + self._step_time if again else 0.0
                self.found.append({"how": blow.how, "lost": lost, "steps": max(blow.step - self.watch.begun, 0)})
        if self._pending:  # of several in a row, the last one counts: the others had not been recovered from
            last = self._pending[-1]
            self.found.append({"how": last.how, "recovery": time.monotonic() - last.now})
        self._pending.clear()
        return True

    def until(self, what: str, ready: Callable[[], Any], timeout: float = PATIENCE, every: float = 0.02) -> None:
        """Until `ready()` or the end."""
        wait(what, lambda: self.over() or ready(), timeout, every)

    def approach(self, moment: str, at: float, window: float, last: int) -> None:
        """Waits for the moment of a blow: `at`, 0 to 1, of the window in seconds, but not up to the last steps."""
        watch = self.watch
        if moment == "starting":
            self.until("two processes", lambda: len(ranks(self.workdir)) == 2)
            due = time.monotonic() + START * at
            self.until("a moment of the start", lambda: self.recovered() or time.monotonic() > due)
            return
        self.until("a first new step", self.recovered)
        due = time.monotonic() + window * at
        self.until("a moment of the run", lambda: watch.look() or watch.step > 0.95 * last or time.monotonic() > due)
        if moment == "saving":
            self.until("a save", lambda: watch.look() or saving(self.workdir), every=0.002)
            time.sleep(SAVE * at)

    def deal(self, how: str, draw: float) -> None:
        """Strikes, unless there is nobody to."""
        self.watch.look()
        now, inside = time.monotonic(), saving(self.workdir)
        if not strike(self.workdir, how, draw):
            self.found.append({"how": how, "missed": True})
            return
        starting = self.watch.begun is None or self.watch.step == self.watch.begun
        self._pending.append(Blow(how, starting, now, self.watch.step, dict(self.watch.times)))
        self.found.append({"how": how, "inside": inside, "starting": starting})
        self.watch.struck()


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """A run with these blows, from its start to its end."""
    steps, blows, wrong = trial["steps"], trial["blows"], []
    c, workdir, log = config(steps), own / "run", own / "log"
    undisturbed = straight(shared / f"straight-{steps}", c, 2, 1, **QUICK)
    step_time = statistics.median(row["seconds_per_step"] for row in metrics.read(str(undisturbed))[2:])
    window = 1.2 * steps * step_time / len(blows)  # so that all of them fall within the run, nearly always
    with started(supervised(workdir, config_file(own, config(steps, HANG))), log, **QUICK) as process:
        siege = Siege(workdir, process, step_time)
        try:
            for blow in blows:
                siege.approach(blow["moment"], blow["at"], window, steps)
                if siege.over():
                    break
                siege.deal(blow["how"], blow["draw"])
            siege.until("a first new step", siege.recovered)
            siege.until("the run's end", siege.over, PATIENCE + 20 * steps * step_time, every=0.2)
        except TimeoutError as e:
            wrong.append(f"{e}: {log.read_text(errors='replace')[-300:]}")
    if not wrong and process.returncode:
        wrong.append(f"the run ended with {process.returncode}: {log.read_text(errors='replace')[-300:]}")
    if left := processes(workdir):
        wrong += [] if wrong else [f"{len(left)} processes were left behind"]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wrong += ended_alike(c, undisturbed, workdir, steps) if not wrong else []
    alike = not wrong
    wrong += [f"recovery took {f['recovery']:.0f} s" for f in siege.found if f.get("recovery", 0) > RECOVERY]
    asked = [[blow["how"], blow["moment"]] for blow in blows]
    return {"wrong": wrong, "alike": alike, "asked": asked, "found": siege.found, "step_time": step_time}


def judge(results: list[Result]) -> Verdict:
    """All runs end alike, and the median of what was lost is no more than the time between temporary checkpoints.

    The median of fewer than ENOUGH losses is told, and not judged. Blows that were not dealt prove nothing: most are to
    have been, and of what was asked for OFTEN, some.
    """
    found = [entry for result in results for entry in result["found"]]
    lost = [entry["lost"] for entry in found if "lost" in entry]
    recoveries = [entry["recovery"] for entry in found if "recovery" in entry]
    dealt = [entry for entry in found if "inside" in entry]
    kinds = {how: sum(blow["how"] == how for blow in dealt) for how in HOWS}
    inside, starting = (sum(blow[when] for blow in dealt) for when in ("inside", "starting"))
    wrong, median = all_wrong(results), statistics.median(lost) if lost else 0.0
    if len(lost) >= ENOUGH and median > INTERVAL:
        wrong += (f"the median lost work is {median:.1f} s, more than the {INTERVAL:g} s between checkpoints",)
    told = ", ".join(f"{n} {how}" for how, n in kinds.items())
    alike = sum(result["alike"] for result in results)
    asked = [blow for result in results for blow in result["asked"]]
    if len(dealt) < DEALT * len(asked):
        wrong += (f"only {len(dealt)} of {len(asked)} blows were dealt",)
    never = [how for how in HOWS if sum(how == a for a, _ in asked) >= OFTEN and not kinds[how]]
    never += ["inside a save"] if sum(moment == "saving" for _, moment in asked) >= OFTEN and not inside else []
    wrong += tuple(f"never dealt: {what}" for what in never)
    held = f"{alike} of {len(results)} runs ended bit-equal ({told}; {inside} inside a save, {starting} in a start)"
    if missed := sum("missed" in entry for entry in found):
        held += f"; {missed} blows struck nobody"
    return Verdict(len(dealt), held, wrong, median, max(recoveries, default=None))


def missing() -> str:
    return "" if pathlib.Path("/proc/self/task").is_dir() else "needs Linux's /proc"


ROW = Row(
    "kills",
    "SIGKILL of a rank, the coordinator or a data thread, SIGSTOP of a rank, in runs of two processes",
    missing,
    trials,
    attempt,
    judge,
)
