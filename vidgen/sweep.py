"""`vidgen sweep`: many runs of one config, each once, and their results as one table."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import io
import json
import operator
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vidgen import config as configs
from vidgen import evaluate, train
from vidgen.config import ConfigError
from vidgen.evaluation.suite import Asked
from vidgen.scaling import budgets, manifest
from vidgen.scaling.algebra import Point, Space, chain, product
from vidgen.scaling.local import Local
from vidgen.scaling.manifest import Manifest, Run
from vidgen.studio import media
from vidgen.studio.sweeps import Table
from vidgen.training import metrics
from vidgen.training.resilience import StopSignal, only_one

JOB = ("-m", "vidgen.sweep_run")  # what Python is given for a run, and then the folder and the name
JOBS = "jobs.json"  # in the sweep's folder: the handles of the jobs at work, for the next driver
PATIENCE = 120.0  # seconds that jobs have to save when they are asked to stop
MOST = 10_000  # runs; a sweep of more is a slip


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the `get_sweep(arg)` of a sweep's file returns.

    Attributes:
      config: FILE or FILE:arg that all runs start from.
      runs: a space of `scaling/algebra.py`.
      base: settings of all runs.
      suites: of `vidgen evaluate`, for each run when it is trained; their figures become columns `SUITE.FIGURE`.
      prompts: clips that those of them judge that draw clips.
      options: of the launchers slurm and jobset: those of a Slurm job or of a JobSet.
      notes: lines to print before it starts, of runs that were left out, say.
    """

    config: str
    runs: Space | Point
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    suites: tuple[str, ...] = ()
    prompts: int = 144
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises ConfigError for what is of another type: sweeps are written by hand."""
        chain(self.runs, self.base)
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"Sweep(options={self.options!r}): expected options by their names, as {{'time': 120}}")
        if isinstance(self.suites, str) or not all(isinstance(x, str) for x in self.suites):
            raise ConfigError(f"Sweep(suites={self.suites!r}): expected several names, as in suites=('moving_shapes',)")
        if isinstance(self.prompts, bool) or not isinstance(self.prompts, int):
            raise ConfigError(f"Sweep(prompts={self.prompts!r}): expected a whole number")


class Launcher(Protocol):
    """What starts jobs somewhere, and knows them by their handles.

    Attributes:
      name: as --launcher has it.
      pause: seconds between looks at the jobs.
    """

    name: str
    pause: float

    def start(self, name: str, argv: Sequence[str], folder: str) -> str: ...
    def alive(self, handles: Sequence[str]) -> set[str]: ...
    def stop(self, handle: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """How many runs of a sweep are done, failed and still to do, and where the table lies."""

    done: int
    failed: int
    pending: int
    results: str


def run(
    sweep: str, output: str, *, launcher: str = "local", width: int = 1, retries: int = 1, dry_run: bool = False
) -> Result:
    """Brings all runs of a sweep to their end, and writes OUTPUT/results.csv and results.parquet.

    Runs that are done are left alone; those that failed are tried again; those that were stopped go on. A run that is
    still at work for an earlier driver is waited for.

    Args:
      sweep: FILE or FILE:arg, a Python file with `get_sweep(arg) -> Sweep`.
      output: folder of the sweep.
      launcher: local, slurm or jobset.
      width: jobs at a time.
      retries: times that a run is tried again after it failed, by this call.
      dry_run: prints the runs, their sizes and steps, and starts nothing.

    Raises ConfigError.
    """
    if width < 1:
        raise ConfigError(f"--width={width}: expected at least 1")
    if retries < 0:
        raise ConfigError(f"--retries={retries}: expected 0 or more")
    asked = load(sweep)
    plan = planned(asked)
    table = Table([run.name for run in plan.runs])
    for note in asked.notes:
        print(f"left out: {note}")
    if dry_run:
        print(table.costs([row(output, run) | run.cost for run in plan.runs]))
        return counted(output, plan)
    jobs = launched(launcher, width, asked.options)
    with only_one(output), StopSignal() as stop:
        manifest.write(output, plan)
        drive(output, plan, jobs, width, retries, stop, table)
    write_results(output)
    found = counted(output, plan)
    if earlier := len(manifest.read(output).runs) - len(plan.runs):
        print(f"also in the table: {earlier} runs that the sweep had before and no longer has")
    print(f"{found.done} done, {found.failed} failed, {found.pending} to do: {found.results}")
    for one in plan.runs:
        if (told := manifest.result(output, one.name)) and told["status"] == "failed":
            print(f"failed: {one.name}: {told['error']}; see {manifest.workdir(output, one.name)}/log.txt")
    if found.pending:
        print("The same command goes on.")
    elif found.done:
        print(f"The law in it: vidgen fit --runs {found.results}")
    return found


def load(file: str) -> Sweep:
    """The sweep of FILE or FILE:arg; raises ConfigError."""
    path, found = configs.called(file, "sweep", "get_sweep")
    if not isinstance(found, Sweep):
        raise ConfigError(f"--sweep={path}: get_sweep returned {type(found).__name__}; expected a vidgen.sweep.Sweep")
    return found


def planned(sweep: Sweep) -> Manifest:
    """The runs, each checked as training checks it; raises ConfigError, naming the run."""
    _check_suites(sweep)
    points = chain(sweep.runs)
    if len(points) > MOST:
        raise ConfigError(f"the sweep expands to {len(points):,} runs; expected at most {MOST:,}")
    runs = manifest.expand(tuple(product(sweep.base, point)[0] for point in points))
    same: dict[str, str] = {}  # whole config → name of its run
    costs = {}
    for one in runs:
        try:
            config = configs.load(sweep.config, one.settings)
            train.check(config)
            size = budgets.size_of(config)
            # Too late when a run is to be judged. Clips may lie where the jobs run and not here: jobs find out then.
            if config.data.source == "moving_shapes" or os.path.isdir(config.data.source):
                evaluate.check(config, sweep.suites, Asked(sweep.prompts))
        except ConfigError as e:
            raise ConfigError(f"run {one.name}: {e}") from None
        if (other := same.setdefault(configs.to_json(config), one.name)) != one.name:
            raise ConfigError(f"runs {other} and {one.name} are the same run; expected each once")
        steps = config.train.steps
        costs[one.name] = {
            "parameters": size.parameters,
            "tokens": size.tokens * steps,
            "flops": size.flops * steps,
            "steps": steps,
        }
    # What varies is said by every run, also where it is as in the config: a table has no gaps then.
    plain = configs.load(sweep.config)
    runs = tuple(
        dataclasses.replace(
            one,
            settings={key: operator.attrgetter(key)(plain) for key in one.varied} | one.settings,
            cost=costs[one.name],
        )
        for one in runs
    )
    path, colon, arg = sweep.config.partition(":")
    base = json.loads(configs.to_json(plain))
    return Manifest(os.path.abspath(path) + colon + arg, base, tuple(sweep.suites), sweep.prompts, runs)


def _check_suites(sweep: Sweep) -> None:
    """Before anything is trained: it would be too late when a run is to be judged."""
    for suite in sweep.suites:
        if suite not in evaluate.SUITES:
            near = difflib.get_close_matches(suite, evaluate.SUITES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(evaluate.SUITES)}"
            raise ConfigError(f"the sweep's suites: unknown {suite!r}; {hint}")
    if sweep.prompts < 1:
        raise ConfigError(f"the sweep's prompts={sweep.prompts}: expected at least 1")


def launched(name: str, width: int, options: Mapping[str, Any]) -> Launcher:
    """The launcher of that name; raises ConfigError."""
    if name == "local":
        return Local(width)
    if name == "slurm":
        from vidgen.scaling.slurm import Slurm

        return Slurm(options)
    if name == "jobset":
        from vidgen.scaling.jobset import JobSet

        return JobSet(options)
    raise ConfigError(f"--launcher={name}: known are local, slurm, jobset")


def drive(
    output: str, plan: Manifest, jobs: Launcher, width: int, retries: int, stop: StopSignal, table: Table
) -> None:
    """Starts runs, `width` at a time, until all have ended or `stop` is asked for."""
    handles = _handles(output, jobs.name)  # of jobs that an earlier driver started and that may still be at work
    runs = {one.name: one for one in plan.runs}
    rows = {name: row(output, one) for name, one in runs.items()}
    queue = [name for name in runs if rows[name]["status"] != "done" and name not in handles]
    tries: Counter[str] = Counter()
    while queue or handles:
        alive = jobs.alive(list(handles.values()))
        ended = [name for name, handle in handles.items() if handle not in alive]
        for name in ended:
            del handles[name]
            if name not in runs:  # the sweep has it no longer
                continue
            found = manifest.result(output, name)
            if found:
                tries[name] = max(tries[name], 1)  # that of an earlier driver
            if not found or found["status"] == "failed":
                if tries[name] <= retries:
                    queue.append(name)
                elif not found:
                    _give_up(output, name)
            rows[name] = row(output, runs[name])
        if ended:
            write_results(output)
        if stop.requested:
            handles = _stopped(jobs, handles)
            break
        while queue and len(handles) < width:
            name = queue.pop(0)
            _put_aside(output, name)
            rows[name] = row(output, runs[name])
            tries[name] += 1
            argv = [sys.executable, *JOB, os.path.abspath(output), name]
            handles[name] = jobs.start(name, argv, manifest.workdir(output, name))
            _keep(output, jobs.name, handles)
        table.show([found | place(output, name, name in handles) for name, found in rows.items()])
        if handles:
            time.sleep(jobs.pause)
    _keep(output, jobs.name, handles)
    table.close()


def _put_aside(output: str, name: str) -> None:
    """Keeps what a failed try left under another name: all of it where the loss was not finite, since the run would
    only go on from there; else its result alone, and the run goes on from its last checkpoint.
    """
    found, folder = manifest.result(output, name), manifest.workdir(output, name)
    if found is None:
        return
    path = folder if "loss" in found and not manifest.finite(found["loss"]) else os.path.join(folder, manifest.RESULT)
    n = 1
    while os.path.exists(aside := f"{path}.failed-{n}"):
        n += 1
    shutil.move(path, aside)


def _give_up(output: str, name: str) -> None:
    """Of a job that ends again and again without a word: killed for its memory, say."""
    path = os.path.join(manifest.workdir(output, name), manifest.RESULT)
    told = {"status": "failed", "error": "its process ended without a result; was it killed for its memory?"}
    media.write(path, json.dumps(told).encode())


def _stopped(jobs: Launcher, handles: Mapping[str, str]) -> dict[str, str]:
    """Asks all to stop and waits until they have saved; those that are at work all the same."""
    for handle in handles.values():
        jobs.stop(handle)
    until = time.monotonic() + PATIENCE
    while (alive := jobs.alive(list(handles.values()))) and time.monotonic() < until:
        time.sleep(jobs.pause)
    left = {name: handle for name, handle in handles.items() if handle in alive}
    if left:
        print(f"still at work after {PATIENCE:.0f} s: {', '.join(left)}")
    return left


def _handles(output: str, launcher: str) -> dict[str, str]:
    """Name of a run → handle of its job, as the last driver left them.

    Raises ConfigError where they are another launcher's, since this one could not tell whether they are at work.
    """
    path = os.path.join(output, JOBS)
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        kind, handles = (found["launcher"], found["jobs"]) if found else (launcher, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: {e}: expected the jobs of a sweep; delete it if none is at work") from None
    if handles and kind != launcher:
        raise ConfigError(
            f"{path}: jobs of --launcher={kind} may be at work: {', '.join(handles)}; go on with that launcher, or "
            "delete the file if none is"
        )
    return dict(handles)


def _keep(output: str, launcher: str, handles: Mapping[str, str]) -> None:
    kept = {"launcher": launcher, "jobs": dict(handles)}
    media.write(os.path.join(output, JOBS), json.dumps(kept, indent=1).encode())


def row(output: str, one: Run) -> dict[str, Any]:
    """Of a run, as the results have it: before it has ended, with what it will cost."""
    found = manifest.result(output, one.name) or {"status": "pending", "error": ""}
    first = {"name": one.name, "status": found.pop("status"), "error": found.pop("error", "")}
    return first | one.cost | found | one.labels | {key: one.settings[key] for key in one.varied if key in one.settings}


def place(output: str, name: str, running: bool) -> dict[str, Any]:
    """Of a run that is at work how far it is, beside its `row`, as `Table.show` wants it."""
    found: dict[str, Any] = {"running": running}
    if running:
        with contextlib.suppress(ConfigError, IndexError):
            last = metrics.read(manifest.workdir(output, name))[-1]
            found |= {"step": last["step"], "train_loss": last.get("loss")}
    return found


def write_results(output: str) -> None:
    """OUTPUT/results.csv and results.parquet: a row a run, those that failed or are to do as well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(output, one) for one in manifest.read(output).runs]
    columns = list(dict.fromkeys(key for one in rows for key in one))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    media.write(os.path.join(output, "results.csv"), text.getvalue().encode())
    table = pa.table({key: _column([one.get(key) for one in rows]) for key in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    media.write(os.path.join(output, "results.parquet"), buffer.getvalue())


def _column(values: Sequence[Any]) -> list[Any]:
    """Values as a column of one type: whole numbers, numbers or truth values where all are such, else text."""
    kinds = {type(value) for value in values if value is not None}
    whole = kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values)
    if whole or kinds == {bool}:
        return list(values)
    as_one = float if kinds <= {int, float} else str
    return [None if value is None else as_one(value) for value in values]


def counted(output: str, plan: Manifest) -> Result:
    """How many are done, failed and to do."""
    found = [manifest.result(output, one.name) for one in plan.runs]
    done = sum(f is not None and f["status"] == "done" for f in found)
    failed = sum(f is not None and f["status"] == "failed" for f in found)
    return Result(done, failed, len(found) - done - failed, os.path.join(output, "results.csv"))
