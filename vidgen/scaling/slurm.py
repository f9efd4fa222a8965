"""Runs of a sweep as jobs of a Slurm cluster, through submitit (the extra [slurm])."""

from __future__ import annotations

import contextlib
import difflib
import os
import pathlib
import re
import shlex
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vidgen.config import ConfigError
from vidgen.scaling.commands import told

ROOT = pathlib.Path(__file__).resolve().parents[2]
HINT = "is this a login node of a Slurm cluster?"
RESTARTS = 1000  # times that a job may use up its time and go on
SEVERAL = ("nodes", "ntasks", "ntasks_per_node")  # options that give a job more than one process


class Slurm:
    """A launcher: submits jobs, knows which wait or run, stops them. A handle is a job's number.

    A job outlives whoever submitted it. Before its time is up, or where Slurm announces that it is preempted, what it
    runs is asked to save, and it goes back to the queue under the same number.

    Attributes:
      pause: seconds between looks at the queue, whose server is everybody's.
    """

    name = "slurm"
    pause = 5.0

    def __init__(self, options: Mapping[str, Any]):
        """Takes submitit's parameters of a Slurm job.

        Args:
          options: `time` in minutes, which must be there; `partition`, `gpus_per_node`, `cpus_per_task`, `mem`,
            `account`, `qos`, `constraint`, `setup` (lines of shell before it starts), `signal_delay_s` (seconds before
            the end at which a run is asked to save), `additional_parameters` (any of sbatch's), ….

        A run is one process: several tasks or nodes would start it several times over, and are refused.

        Raises ConfigError for an option that can't be used, one that submitit does not know, naming the nearest; and
        without submitit or Slurm.
        """
        self._submitit = _submitit()
        if "time" not in options:
            raise ConfigError(
                "the sweep's options for Slurm have no time: expected minutes a job may take, as in time=120"
            )
        _check(options)
        told(["squeue", "--version"], HINT, pauses=())
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
        self._options = {"stderr_to_stdout": True} | dict(options) | {"setup": [*setup, *options.get("setup", ())]}
        self._executor(os.devnull)  # so that a wrong option is told before anything has begun

    def start(self, name: str, argv: Sequence[str], folder: str) -> str:
        """Submits `argv` as a job, its output into FOLDER/log.txt; returns its number. Raises ConfigError."""
        folder = os.path.abspath(folder)
        os.makedirs(folder, exist_ok=True)
        executor = self._executor(os.path.join(folder, "submitit"), job_name=name)
        try:
            return executor.submit(Command(tuple(argv), folder)).job_id
        except self._submitit.core.utils.FailedJobError as e:
            raise ConfigError(f"sbatch refused {name}: {' '.join(str(e).split())[:300]}") from None

    def alive(self, handles: Collection[str]) -> set[str]:
        """Those of the jobs that wait, run or end just now. Raises ConfigError where Slurm does not say."""
        there = told(["squeue", "--noheader", "--format=%A", "--me"], HINT).split()
        return set(handles) & set(there)

    def stop(self, handle: str) -> None:
        """Takes a job off the queue, or asks what it runs to save and end."""
        for which in ("--state=PENDING", "--signal=TERM"):
            try:
                told(["scancel", "--quiet", which, handle], HINT, pauses=())
            except ConfigError:
                if self.alive([handle]):  # else it has ended, which scancel takes for an error
                    raise

    def _executor(self, folder: str, **more: Any) -> Any:
        try:
            executor = self._submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
            executor.update_parameters(**self._options, **more)
        except RuntimeError:  # no srun
            raise ConfigError(f"srun is not on PATH: {HINT}") from None
        except (ValueError, TypeError, NameError) as e:
            known = re.findall(r"- (\w+) \(default", str(e))
            wrong = [name for name in self._options if known and name not in known]
            if not wrong:
                raise ConfigError(f"the sweep's options for Slurm: {' '.join(str(e).split())[:300]}") from None
            near = difflib.get_close_matches(wrong[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"the sweep's options for Slurm: unknown {wrong[0]!r}; {hint}") from None
        return executor


class Command:
    """What submitit pickles and calls in the job: a command, its output added to FOLDER/log.txt."""

    def __init__(self, argv: tuple[str, ...], folder: str):
        self.argv, self.folder = argv, folder
        self.pid: int | None = None  # of what it runs, when it has begun

    def __call__(self) -> None:
        """Runs it to its end; raises RuntimeError if it fails, for Slurm to know."""
        with open(os.path.join(self.folder, "log.txt"), "ab") as log:
            child = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_deaf
            )
        self.pid = child.pid
        if status := child.wait():
            raise RuntimeError(f"exit status {status}: {shlex.join(self.argv)}")

    def checkpoint(self) -> Any:
        """Called by submitit when the time is nearly up: asks what runs to save; returns what is to run again."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGUSR1)
                # It may have come in the middle of wait(), which holds a lock.
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return _submitit().helpers.DelayedSubmission(Command(self.argv, self.folder))


def _deaf() -> None:
    """Slurm sends submitit's signal to all processes of the job, and it would end what has no handler for it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that submitit would take, and that a run of a sweep can't have."""
    more = options.get("additional_parameters")
    for name, value in (*options.items(), *(more.items() if isinstance(more, Mapping) else ())):
        if name.replace("-", "_") in SEVERAL and str(value) != "1":
            raise ConfigError(
                f"the sweep's options for Slurm: {name}={value}: expected 1, since a run of a sweep is one process; "
                "for a run of several: launch/slurm.sh"
            )
    if "job_name" in options:
        raise ConfigError("the sweep's options for Slurm: a job is called like its run; leave job_name out")
    if isinstance(options.get("setup"), str):
        raise ConfigError(f"the sweep's options for Slurm: setup={options['setup']!r}: expected a list of lines")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError('the launcher slurm needs the extra [slurm]: pip install "vidgen[slurm]"') from None
    return submitit
