"""The loop of `vidgen train`: steps, and what is due between two of them."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from vidgen.data.quarantine import Quarantine
from vidgen.data.stream import FeedInfo
from vidgen.parallel import processes
from vidgen.parallel.processes import Restartable
from vidgen.training import incidents, metrics, planned
from vidgen.training.checkpoint import Checkpoints
from vidgen.training.course import Course
from vidgen.training.goodput import Ledger
from vidgen.training.guards import BadSteps, Guards, Verdict, batch_step
from vidgen.training.meter import Meter
from vidgen.training.metrics import MetricWriter, Progress
from vidgen.training.profiler import Profiler
from vidgen.training.program import Program
from vidgen.training.recheck import Recheck
from vidgen.training.resilience import Breaks, Interrupted, StopSignal, claim
from vidgen.training.state import TrainState
from vidgen.training.step import Batch
from vidgen.training.watchdog import Phase, Watchdog

Numbers = dict[str, jax.Array]  # what a step reports


@dataclasses.dataclass(frozen=True)
class Due:
    """What is to be done after a step; `temporary`: the checkpoint goes when there is a newer one."""

    save: bool
    temporary: bool
    judge: bool
    draw: bool


@dataclasses.dataclass(eq=False)
class Loop:
    """An attempt at a run: its parts, and where it is. All processes do the same.

    Attributes:
      program, course, workdir: what is trained, on what, and where it is written down.
      facts: that every checkpoint keeps.
      checkpoints, guards, meter, ledger, watch, stop, progress, profiler, quarantine: see there.
      writer: of the process that writes what a run has one of; None in all others.
      claim: which lock that process holds, see `resilience.claim`.
      stopped_by: number of the signal that has ended the attempt; 0: none has.
      last: the last row of metrics.jsonl.
    """

    program: Program
    course: Course
    workdir: str
    facts: dict[str, Any]
    checkpoints: Checkpoints
    guards: Guards
    meter: Meter
    ledger: Ledger
    watch: Watchdog
    stop: StopSignal
    progress: Progress
    profiler: Profiler
    quarantine: Quarantine
    writer: MetricWriter | None
    claim: tuple[int, int] | None
    stopped_by: int = 0
    last: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = planned.rows_of(self.program, self.course.source)
        self._bad_steps = BadSteps(self.workdir, self.config, self.course.source, rows, self.progress.say)
        self._recheck = Recheck(self.program, self.workdir)
        self._pulse = processes.Pulse(3)
        self._compiled: set[Any] = set()
        self._unreadable = 0
        self._saved_at = time.monotonic()

    @property
    def config(self) -> ConfigDict:
        """Of the run."""
        return self.program.config

    def run(self, state: TrainState) -> int:
        """Takes steps up to `config.train.steps`, or until a stop is asked for; how many have been taken in all.

        Raises ConfigError for what the user can mend, and Restartable for what a restart does.
        """
        while True:
            n, spike = self._steps(state)
            if spike is None:
                break
            state = self._rolled_back(spike)
        self.watch.beat(n, "save")
        with self.ledger.spent("save"):
            self.checkpoints.wait()
        if n >= self.config.train.steps:
            self.ledger.finished()
        return n

    def make_up(self, state: TrainState, judge: bool, draw: bool) -> None:
        """Judges and draws what an attempt that was stopped or killed after saving this state owes of its step."""
        n = int(state.step)
        try:
            if judge and (more := self._judged(n, state)) and self.writer:
                row = next((row for row in reversed(metrics.read(self.workdir)) if row["step"] == n), {})
                known = {name: value for name, value in row.items() if name != "step" and value is not None}
                self.writer.resume(n)
                self.writer.scalars(n, known | more)
            if draw:
                self._draw(n, state)
        except Interrupted as e:
            self.stopped_by = e.number  # it is saved as it is

    def _steps(self, state: TrainState) -> tuple[int, Verdict | None]:
        """(steps taken in all, None), or with the spike that the run is to be rolled back for."""
        n, late = int(state.step), None
        with self.course.batches(batch_step(n, self.guards.jumps)) as batches:
            while n < self.config.train.steps and not self.stopped_by:
                n += 1
                self.profiler.before(n)
                with self.ledger.spent("data wait"):
                    batch, info = next(batches)
                if _due(n, self.config.train.recheck_every):
                    self._check(n, state, batch)
                state, metrics = self._take(n, state, batch)
                self._fed(n, info)
                # One step late: the device has step n to do while the host waits for the numbers of n - 1.
                if late and (spike := self._finish(*late)):
                    return n, spike
                late = (n, metrics)
                self.profiler.after(n, metrics)
                due = self._due(n, info)
                # The next step takes over the state's memory, so what looks at the state does it now.
                if due.save or due.judge or due.draw:
                    jax.block_until_ready(metrics)
                    late = None
                    if spike := self._between(n, state, metrics, due):
                        return n, spike
        return n, None

    def _check(self, n: int, state: TrainState, batch: Batch) -> None:
        """Whether step n would have the same bits twice; raises Restartable where it hasn't."""
        clock = time.perf_counter()
        self.watch.beat(n, "compile")
        with self.ledger.spent("eval"):
            self._recheck(n - 1, state, batch)
        self.meter.aside(time.perf_counter() - clock)

    def _take(self, n: int, state: TrainState, batch: Batch) -> tuple[TrainState, Numbers]:
        """Step n, whose compilation, where it is the first of its kind, is no part of the run's speed."""
        step, clock = self.program.step_after(n - 1), time.perf_counter()
        kind = (step, *(x.shape for x in jax.tree.leaves(batch)))
        new = kind not in self._compiled
        self.watch.beat(n, "compile" if new else "step")
        with self.ledger.spent("compile" if new else "step"):
            result = step(state, batch)
        if new:
            self._compiled.add(kind)
            self.meter.aside(time.perf_counter() - clock)
        self.stop.nothing_to_lose = False
        self.watch.beat(n, "step")
        self.ledger.step(n)
        return result

    def _fed(self, n: int, info: FeedInfo) -> None:
        """Counts the clips of a batch that could not be read; of several processes, all of theirs."""
        self.meter.fed(
            info if processes.alone() else dataclasses.replace(info, bad={"see the quarantine": self._unreadable})
        )
        self.quarantine.add(n, info)

    def _due(self, n: int, info: FeedInfo) -> Due:
        """What is due after step n, the same on all processes; learns of signals, of all of them."""
        train, now = self.config.train, time.monotonic()
        # One clock decides, and the others are told.
        time_is_up = bool(train.checkpoint_minutes) and now - self._saved_at >= 60 * train.checkpoint_minutes
        time_is_up = time_is_up and processes.is_lead()
        if time_is_up:
            self._saved_at = now  # asked for, and not once more before it is there
        told = self._pulse(self.stop.number, sum(info.bad.values()), time_is_up)
        self.stopped_by, self._unreadable = int(told[:, 0].max()), int(told[:, 1].sum())
        if processes.preempted(n):
            self.stopped_by = self.stopped_by or signal.SIGTERM
        by_step = n == train.steps or _due(n, train.checkpoint_every)
        save = by_step or bool(self.stopped_by) or bool(told[:, 2].any())
        # A run that is asked to stop has little time: the next attempt makes up for the rest.
        rest = not self.stopped_by
        return Due(save, not by_step, rest and _due(n, train.eval_every), rest and _due(n, train.sample_every))

    def _between(self, n: int, state: TrainState, metrics: Numbers, due: Due) -> Verdict | None:
        """Judges, saves and draws; a spike where the step was one, which is not saved."""
        clock, more = time.perf_counter(), {}
        if due.judge:
            try:
                more = self._judged(n, state)
            except Interrupted as e:
                self.stopped_by = e.number
        self.meter.aside(time.perf_counter() - clock)
        if spike := self._finish(n, metrics, more):
            return spike
        clock = time.perf_counter()
        if save := due.save or bool(self.stopped_by):
            self._save(n, state, due.temporary, more)
        if due.draw and not self.stopped_by:
            try:
                self._draw(n, state)
            except Interrupted as e:
                self.stopped_by = e.number
                if not save:
                    self._save(n, state, due.temporary, more)
        self.meter.aside(time.perf_counter() - clock)
        self.watch.beat(n, "step")
        return None

    def _judged(self, n: int, state: TrainState) -> dict[str, float]:
        """The figures of held-out clips. Raises Interrupted where a stop is asked for before they are there."""
        assert self.course.heldout is not None
        with self.ledger.spent("eval"):
            return self.course.heldout(self.program.averaged(state), self._pause(n, "eval"))

    def _save(self, n: int, state: TrainState, temporary: bool, figures: dict[str, float]) -> None:
        self.watch.beat(n, "save")
        lock = self.claim
        if self.writer:
            with contextlib.suppress(OSError):  # the disk is away for a moment: then nobody knows
                lock = claim(self.workdir)
        if lock not in (self.claim, None):
            raise Restartable(f"{self.workdir} was replaced while the run was at work: step {n} is not saved there")
        with self.ledger.spent("save"):
            if self.writer:
                self.writer.flush()  # what was measured up to here is on disk before the state is
            facts = self.facts | {"tokens_seen": self.meter.tokens_seen} | self.guards.facts()
            facts |= self.course.publish(state.ema, self.workdir)
            self.checkpoints.save(state, facts, temporary=temporary, metrics=figures)
            if lock != self.claim:  # nobody could know any more that it is at work there
                self.checkpoints.wait()
                raise Restartable(
                    f"{self.workdir} was removed while the run was at work: step {n} is saved there again, and the "
                    "same command goes on from it"
                )
        self._saved_at = time.monotonic()

    def _draw(self, n: int, state: TrainState) -> None:
        """Raises Interrupted where a stop is asked for before the pictures are there."""
        with self.ledger.spent("sample"):
            self.course.draw(self.program.averaged(state), n, self.workdir, self.writer, self._pause(n, "sample"))

    def _pause(self, n: int, phase: Phase) -> Callable[[], None]:
        """To be called between two batches of something long: it goes on, and is left where a stop is asked for."""
        breaks = Breaks(self.stop)

        def pause() -> None:
            self.watch.beat(n, phase)
            breaks()

        pause()
        return pause

    def _finish(self, n: int, metrics: Numbers, more: dict[str, float] | None = None) -> Verdict | None:
        """Takes the numbers of step n, and writes them where they are due; a spike that they are the last of."""
        train = self.config.train
        self.meter.done(n, metrics)
        verdict = self.guards.seen(n, metrics)
        if verdict.kind and processes.is_lead():
            self._bad_steps.write(verdict, self.guards.jumps, self.checkpoints.steps)
        if verdict.kind == "spike":
            return verdict
        if more or n == train.steps or _due(n, train.log_every):
            self.checkpoints.check()
            self.last = self.meter.row() | {"goodput": self.ledger.summary()["goodput"]} | (more or {})
            if self.writer:
                self.writer.scalars(n, self.last)
            self.progress.update(n, self.last)
        return None

    def _rolled_back(self, spike: Verdict) -> TrainState:
        """The state of the newest good checkpoint from before a spike; from there on with batches not seen yet.

        The checkpoints since are moved aside. Raises ConfigError where there have been enough of that.
        """
        self.watch.beat(spike.step, "start")  # reading checkpoints takes as long as at the start
        self.checkpoints.wait()
        steps = processes.agree(self.checkpoints.steps)  # listings of a shared disk may differ for a moment
        good = [step for step in steps if not self.checkpoints.damage(step)]
        to = self.guards.target(spike, good)
        facts = self.checkpoints.facts(to) if to else None
        state = restored(self.program, self.checkpoints, to)
        for step in [step for step in steps if step > to]:
            self.checkpoints.set_aside(step, "spike")
        self.guards = self.guards.rolled_back(spike, to, facts)
        self.meter.back_to(facts["tokens_seen"] if facts else 0.0)
        self.ledger.resumed(to)
        if self.writer:
            self.writer.resume(to + 1)
            text = f"rolled back from step {spike.step} to {to}: {spike.why}; the batches since are left out"
            incidents.record(self.workdir, spike.step, "rollback", text)
            self.progress.say(f"Step {spike.step}: {text}")
        return state


def restored(program: Program, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state after so many steps, straight into its shardings: of a checkpoint, or made where there are none."""
    if not step:
        return program.init()
    return checkpoints.restore(step, program.state_like).replace(frozen=program.frozen())


def _due(n: int, every: int) -> bool:
    return every > 0 and n % every == 0
