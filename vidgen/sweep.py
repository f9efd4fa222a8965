"""`vidgen sweep`: many runs of one config, each once, and their results as one table."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vidgen import config as configs
from vidgen import train
from vidgen.config import ConfigError
from vidgen.scaling import budgets, manifest
from vidgen.scaling.algebra import Space, product
from vidgen.scaling.local import Local
from vidgen.scaling.manifest import Manifest, Run
from vidgen.studio import media
from vidgen.studio.sweeps import Table
from vidgen.training import metrics
from vidgen.training.resilience import StopSignal, only_one

POLL = 1.0  # seconds between looks at the jobs
JOB = ("-m", "vidgen.sweep_run")  # what Python is given for a run, and then the folder and the name
MOST = 10_000  # runs; a sweep of more is a slip


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the `get_sweep(arg)` of a sweep's file returns.

    Attributes:
      config: FILE or FILE:arg that all runs start from.
      runs: a space of `scaling/algebra.py`.
      base: settings of all runs.
      suites: of `vidgen evaluate`, for each run when it is trained; their figures become columns `SUITE.FIGURE`.
      prompts: clips that those judge.
      options: of the launcher: those of a Slurm job or of a JobSet.
      notes: lines to print before it starts, of runs that were left out, say.
    """

    config: str
    runs: Space
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    suites: tuple[str, ...] = ()
    prompts: int = 144
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Launcher(Protocol):
    """What starts jobs somewhere, and knows them by their handles."""

    def start(self, name: str, argv: Sequence[str], folder: str) -> str: ...
    def alive(self, handles: Sequence[str]) -> set[str]: ...
    def stop(self, handle: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What a sweep gave: how many runs are done, failed and still to do, and where the table lies."""

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
        print(table.costs([row(output, run) | cost(plan, run) for run in plan.runs]))
        return counted(output, plan)
    jobs = launched(launcher, width, asked.options)
    with only_one(output), StopSignal() as stop:
        manifest.write(output, plan)
        drive(output, plan, jobs, width, retries, stop, table)
    write_results(output)
    found = counted(output, manifest.read(output))
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
    path, _, arg = file.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"--sweep={path}: no such file")
    spec = importlib.util.spec_from_file_location("vidgen_sweep", path)
    if spec is None:
        raise ConfigError(f"--sweep={path}: expected a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_sweep(arg)
    except ConfigError as e:
        raise ConfigError(f"--sweep={path}: {e}") from None
    except Exception as e:  # whatever a user's file may raise
        raise ConfigError(f"--sweep={path}: {type(e).__name__}: {e}") from e
    if not isinstance(found, Sweep):
        raise ConfigError(f"--sweep={path}: get_sweep returned {type(found).__name__}; expected a vidgen.sweep.Sweep")
    return found


def planned(sweep: Sweep) -> Manifest:
    """The runs, each checked as training checks it; raises ConfigError, naming the run."""
    if len(sweep.runs) > MOST:
        raise ConfigError(f"the sweep expands to {len(sweep.runs):,} runs; expected at most {MOST:,}")
    runs = manifest.expand(tuple(product(sweep.base, point)[0] for point in sweep.runs))
    for one in runs:
        try:
            train.check(configs.load(sweep.config, one.settings))
        except ConfigError as e:
            raise ConfigError(f"run {one.name}: {e}") from None
    path, colon, arg = sweep.config.partition(":")
    return Manifest(os.path.abspath(path) + colon + arg, tuple(sweep.suites), sweep.prompts, runs)


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
    handles = _handles(output)  # of jobs that an earlier driver started and that may still be at work
    queue = [one.name for one in plan.runs if not _done(output, one.name) and one.name not in handles]
    tries: Counter[str] = Counter()
    while queue or handles:
        alive = jobs.alive(list(handles.values()))
        for name in [name for name, handle in handles.items() if handle not in alive]:
            del handles[name]
            if not _done(output, name) and tries[name] <= retries:
                queue.append(name)
            elif manifest.result(output, name) is None:
                _give_up(output, name)
            write_results(output)
        if stop.requested:
            for handle in handles.values():
                jobs.stop(handle)
            _wait(jobs, handles)
            break
        while queue and len(handles) < width:
            name = queue.pop(0)
            _put_aside(output, name)
            tries[name] += 1
            argv = [sys.executable, *JOB, os.path.abspath(output), name]
            handles[name] = jobs.start(name, argv, manifest.workdir(output, name))
            _keep(output, handles)
        table.show([row(output, one) | {"running": one.name in handles} for one in plan.runs])
        if handles:
            time.sleep(POLL)
    _keep(output, handles)
    table.close()


def _done(output: str, name: str) -> bool:
    found = manifest.result(output, name)
    return found is not None and found["status"] == "done"


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


def _wait(jobs: Launcher, handles: Mapping[str, str], seconds: float = 120.0) -> None:
    """Until those that were asked to stop have saved."""
    until = time.monotonic() + seconds
    while jobs.alive(list(handles.values())) and time.monotonic() < until:
        time.sleep(POLL)


def _handles(output: str) -> dict[str, str]:
    """Name of a run → handle of its job, as the last driver left them."""
    try:
        with open(os.path.join(output, "jobs.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def _keep(output: str, handles: Mapping[str, str]) -> None:
    media.write(os.path.join(output, "jobs.json"), json.dumps(handles, indent=1).encode())


def cost(plan: Manifest, one: Run) -> dict[str, Any]:
    """Parameters, tokens, FLOPs and steps that a run will have."""
    config = configs.load(plan.config, one.settings)
    size, steps = budgets.size_of(config), config.train.steps
    return {
        "parameters": size.parameters,
        "tokens": size.tokens * steps,
        "flops": size.flops * steps,
        "steps": steps,
    }


def row(output: str, one: Run) -> dict[str, Any]:
    """Of a run, as the results have it: what is not known yet is left out. "step" is how far it is."""
    found = manifest.result(output, one.name) or {"status": "pending", "error": ""}
    first = {"name": one.name, "status": found.pop("status"), "error": found.pop("error", "")}
    with contextlib.suppress(ConfigError, IndexError):
        last = metrics.read(manifest.workdir(output, one.name))[-1]
        first |= {"step": last["step"], "train_loss": last.get("loss")}
    return first | found | one.labels | {key: one.settings[key] for key in one.varied if key in one.settings}


def write_results(output: str) -> None:
    """OUTPUT/results.csv and results.parquet: a row a run, those that failed or are to do as well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(output, one) for one in manifest.read(output).runs]
    for one in rows:
        one.pop("train_loss", None)
        one.pop("step", None)
    columns = list(dict.fromkeys(key for one in rows for key in one))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    media.write(os.path.join(output, "results.csv"), text.getvalue().encode())
    plain = [{key: _cell(value) for key, value in one.items()} for one in rows]
    table = pa.Table.from_pylist([{key: one.get(key) for key in columns} for one in plain])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    media.write(os.path.join(output, "results.parquet"), buffer.getvalue())


def _cell(value: Any) -> Any:
    """What a column of one type can hold: numbers as they are, all else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def counted(output: str, plan: Manifest) -> Result:
    """How many are done, failed and to do."""
    found = [manifest.result(output, one.name) for one in plan.runs]
    done = sum(f is not None and f["status"] == "done" for f in found)
    failed = sum(f is not None and f["status"] == "failed" for f in found)
    return Result(done, failed, len(found) - done - failed, os.path.join(output, "results.csv"))
