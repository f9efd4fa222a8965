"""Runs of a sweep as jobs of a Slurm cluster, through submitit (the extra [slurm])."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vidgen.config import ConfigError
from vidgen.scaling.commands import told

ROOT = pathlib.Path(__file__).resolve().parents[2]
HINT = "is this a login node of a Slurm cluster?"
RESTARTS = 1000  # times that a job may use up its time, or be preempted, and go on
SEVERAL = ("nodes", "ntasks", "ntasks_per_node")  # options that give a job more than one process


class Slurm:
    """A launcher: submits jobs, knows which wait or run, stops them. A handle is a job's number.

    A job outlives whoever submitted it. Before its time is up what it runs is asked to save, and it goes back to the
    queue under the same number; so does one that Slurm preempts, by SIGTERM, unless it was stopped or cancelled.

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
        # Some clusters let no job come again that doesn't say so.
        self._options["additional_parameters"] = {"requeue": True, **options.get("additional_parameters", {})}
        self._executor(os.devnull)  # so that a wrong option is told before anything has begun

    def start(self, name: str, argv: Sequence[str], folder: str) -> str:
        """Submits `argv` as a job, its output into FOLDER/log.txt; returns its number. Raises ConfigError.

        One that is there for this folder is not submitted again: whoever did was killed before it had noted the number.
        """
        folder = os.path.abspath(folder)
        own = hashlib.sha256(folder.encode()).hexdigest()[:16]
        if there := [number for number, called in self._queue().items() if called.endswith(f"-{own}")]:
            return there[0]
        os.makedirs(folder, exist_ok=True)
        executor = self._executor(os.path.join(folder, "submitit"), job_name=f"{name}-{own}")
        try:
            return executor.submit(Command(tuple(argv), folder)).job_id
        except self._submitit.core.utils.FailedJobError as e:
            raise ConfigError(f"sbatch refused {name}: {' '.join(str(e).split())[:300]}") from None

    def alive(self, handles: Collection[str]) -> set[str]:
        """Those of the jobs that wait, run or end just now. Raises ConfigError where Slurm does not say."""
        return set(handles) & set(self._queue())

    def stop(self, handle: str) -> None:
        """Takes a job off the queue, or asks what it runs to save and end, for good."""
        with contextlib.suppress(ConfigError):  # it has ended; else it comes again, and is still alive for who waits
            told(["scontrol", "update", f"JobId={handle}", "Requeue=0"], HINT, pauses=())
        for which in ("--state=PENDING", "--signal=TERM"):
            try:
                told(["scancel", "--quiet", which, handle], HINT, pauses=())
            except ConfigError:
                if self.alive([handle]):  # else it has ended, which scancel takes for an error
                    raise

    def _queue(self) -> dict[str, str]:
        """Number → name of the jobs that wait, run or end just now. Raises ConfigError where Slurm does not say."""
        lines = told(["squeue", "--noheader", "--format=%A %j", "--me"], HINT).splitlines()
        return {number: called for number, _, called in (line.partition(" ") for line in lines)}

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
        """Runs it to its end; raises RuntimeError if it fails, for Slurm to know.

        Where SIGTERM ended it, as when the job is preempted, the job goes back to the queue: Slurm would do that only
        after the partition's GraceTime, when this has ended long since.
        """
        with open(os.path.join(self.folder, "log.txt"), "ab") as log:
            child = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_deaf
            )
        self.pid = child.pid
        status = child.wait()
        if status in (-signal.SIGTERM, 128 + signal.SIGTERM) and _put_back():
            sys.exit(status)
        if status:
            raise RuntimeError(f"exit status {status}: {shlex.join(self.argv)}")

    def checkpoint(self) -> Any:
        """Called by submitit when the time is nearly up: asks what runs to save; returns what is to run again."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGUSR1)
                # It may have come in the middle of wait(), which holds a lock.
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return _submitit().helpers.DelayedSubmission(Command(self.argv, self.folder))


def _put_back() -> bool:
    """Puts this job back on the queue, if it was not told to stop; what was cancelled stays so."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= RESTARTS:
        return False
    try:
        told(["scontrol", "requeue", "incomplete", os.environ["SLURM_JOB_ID"]], HINT, pauses=())
    except ConfigError:
        return False
    return True


def _deaf() -> None:
    """Slurm sends submitit's signal to all processes of the job, and it would end what has no handler for it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that submitit would take, and that a run of a sweep can't have."""
    more = options.get("additional_parameters", {})
    if not isinstance(more, Mapping):
        raise ConfigError(f"the sweep's options for Slurm: additional_parameters={more!r}: expected a dict")
    for name, value in (*options.items(), *more.items()):
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
