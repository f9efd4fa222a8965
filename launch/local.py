#!/usr/bin/env python3
"""Runs `vidgen` as several processes on this machine's CPU, each with devices of its own, just as a pod would: they
meet at a coordinator, each feeds its own devices and each writes its part of the checkpoints.

  python launch/local.py --processes 2 --devices 2 -- train --config configs/quickstart.py --workdir runs/a

For trying out a mesh before a pod is rented, and for tests: it is no faster than one process. What the mesh is, the
config says: --config.mesh.fsdp=2, say.

Process 0 speaks on the terminal; each process has its log in WORKDIR/logs/rank-N.log. Ctrl-C, SIGTERM and SIGUSR1 are
passed on to all; one that gets SIGTERM alone tells the others, so that all save after the same step. When one process
fails, the others are ended, and the end of its log is shown. The exit status is that of process 0, or of the one that
failed first. No process outlives this one (on Linux). A first argument that ends with .py is a script to run instead of
vidgen. launch/supervise.py starts all again when one has died.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO

import descent

ROOT = pathlib.Path(__file__).resolve().parents[1]
GRACE = 2.0  # seconds that those who are left have to end by themselves when one has failed
LATE = 60.0  # and when one has stopped, as asked
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that are passed on
STOPPED = {128 + number for number in SIGNALS}  # exit status of a run that was asked to stop, and has saved
TAIL = 15  # lines of the log of a process that failed


def main() -> int:
    """Parses the command line and runs it; the exit status."""
    options, command = parse(sys.argv[1:])
    logs = pathlib.Path(options.logs)
    if options.dry_run:
        return show(command, options.processes, options.devices, logs)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return fail(f"--logs={logs}: {e.strerror}; expected a directory that can be written")
    return run(command, options.processes, options.devices, logs)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, the command to run); exits with 2 and one line for what can't be used."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="local.py",
        usage="python launch/local.py [--processes N] [--devices D] [--logs DIR] [--dry_run] -- VERB …",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many, 2 unless given")
    parser.add_argument("--devices", type=int, default=1, metavar="D", help="CPU devices of each, 1 unless given")
    parser.add_argument("--logs", metavar="DIR", help="where rank-N.log are written; WORKDIR/logs unless given")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, a line a process, and end")
    own, found, command = (
        (argv, "", []) if "--" not in argv else (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :])
    )
    options = parser.parse_args(own)
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            sys.exit(fail(f"--{name}={getattr(options, name)}: expected at least 1"))
    if not (found and command):
        sys.exit(fail("nothing to run: expected -- and a verb of vidgen, as in -- train --config … --workdir …"))
    if options.logs is None:
        workdir = workdir_of(command)
        if workdir is None:
            sys.exit(fail("--logs is missing, and the command has no --workdir to put logs into"))
        options.logs = os.path.join(workdir, "logs")
    return options, command


def workdir_of(command: list[str]) -> str | None:
    """What --workdir=DIR or --workdir DIR says."""
    for argument, following in zip(command, [*command[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            return value if equals else following
    return None


def run(command: list[str], count: int, devices: int, logs: pathlib.Path) -> int:
    """Runs `count` processes to their end; the exit status."""
    port = free_port()
    ranks: list[subprocess.Popen] = []
    before: list[int] = []  # bytes in each log, of earlier runs
    copying: list[threading.Thread] = []
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # ranks, in the order in which they end
    asked = []

    def pass_on(number: int, _frame: object) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    for rank in range(count):
        log = open(logs / f"rank-{rank}.log", "ab", buffering=0)  # noqa: SIM115 - open to the end
        before.append(log.tell())
        pipe = subprocess.PIPE if rank == 0 else log
        # A session of its own, so that a Ctrl-C on the terminal comes once, through this process.
        process = subprocess.Popen(
            program(command),
            env=os.environ | environment(rank, count, devices, port),
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe if rank == 0 else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=descent.bound(),
        )
        ranks.append(process)
        if rank == 0:
            for source, terminal in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                copying.append(threading.Thread(target=copy, args=(source, terminal, log), daemon=True))
        copying.append(threading.Thread(target=lambda rank=rank: ended.put((ranks[rank].wait(), rank)[1]), daemon=True))
    for thread in copying:
        thread.start()
    if asked:  # before all had started
        pass_on(asked[0], None)

    failed = stopped = None  # the rank that ended first so
    for _ in ranks:
        try:
            rank = ended.get(timeout=None if stopped is None else LATE)
        except queue.Empty:  # one is stopped by SIGSTOP, or waits for those that are gone
            end([p for p in ranks if p.poll() is None], 0)
            rank = ended.get()
        status = ranks[rank].returncode
        if status in STOPPED or -status in asked:
            stopped = rank if stopped is None else stopped
        elif status and failed is None and stopped is None:  # without one that has stopped the others can't but fail
            failed = rank
            end([p for p in ranks if p.poll() is None], GRACE)
    for thread in copying:
        thread.join(timeout=5)
    if failed is None:
        status = ranks[stopped or 0].returncode
        return 128 - status if status < 0 else status
    status = ranks[failed].returncode
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
    log = logs / f"rank-{failed}.log"
    print(f"local.py: process {failed} of {count} {how}; the others were ended. {log} ends with:", file=sys.stderr)
    for line in log.read_bytes()[before[failed] :].decode(errors="replace").splitlines()[-TAIL:]:
        print(f"  {line}", file=sys.stderr)
    return 128 - status if status < 0 else status


def show(command: list[str], count: int, devices: int, logs: pathlib.Path) -> int:
    """Prints what `run` would run; the exit status. The port is one that is free now."""
    port = free_port()
    for rank in range(count):
        told = [f"{name}={shlex.quote(value)}" for name, value in environment(rank, count, devices, port).items()]
        log = shlex.quote(str(logs / f"rank-{rank}.log"))
        print(*told, shlex.join(program(command)), ">>" + log, "2>&1 &")
    print("wait")
    return 0


def program(command: list[str]) -> list[str]:
    """A verb of vidgen, or a script, as it is run."""
    return [sys.executable, *(command if command[0].endswith(".py") else ["-m", "vidgen.cli", *command])]


def environment(rank: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What a process finds besides: who it is, where the others are, how many devices it has."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "VIDGEN_COORDINATOR": f"127.0.0.1:{port}",
        "VIDGEN_PROCESSES": str(count),
        "VIDGEN_PROCESS": str(rank),
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def copy(source: BinaryIO, terminal: BinaryIO, log: BinaryIO) -> None:
    """Everything from `source` to both, whole lines, as they come."""
    for line in source:
        log.write(line)
        try:
            terminal.write(line)
            terminal.flush()
        except OSError:  # the terminal has gone; the log stays
            pass


def end(processes: list[subprocess.Popen], seconds: float) -> None:
    """Waits for them, and then no longer: without the one that has gone they can't go on, nor save."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()


def fail(message: str) -> int:
    """Says what is wrong; the exit status for it."""
    print(f"local.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
