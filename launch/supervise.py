#!/usr/bin/env python3
"""Runs a command, as one that trains, and starts it again when it dies or hangs; it goes on from its last checkpoint.

  python launch/supervise.py -- vidgen train --config configs/x.py --workdir runs/a
  python launch/supervise.py -- launch/local.py --processes 2 -- train --config configs/x.py --workdir runs/a
  python launch/supervise.py --hang 300 --restarts 20 -- srun vidgen train --config configs/x.py --workdir /shared/a
  python launch/supervise.py --host 3 -- vidgen train --config configs/x.py --workdir /shared/a

It is started again after any exit status but 0, 2 (the user can mend it) and 128 + a signal that asked it to stop; and
when a process of it shows no progress in WORKDIR/heartbeats for --hang seconds, ten times that while it starts or
compiles: all its processes are killed then, stopped ones too. So are those that have all said there that they ended,
and are still there --hang seconds later; if the run was done then, that is the end. Before a restart it waits 1 s, 2 s,
4 s … 30 s, and 1 s again once the run has come further than ever before. After --restarts in a row that brought it no
further it gives up.

WORKDIR/supervisor.json says how each attempt went, at which step and with which last words, as does the report when it
gives up; WORKDIR/incidents.jsonl has a row a restart. Ctrl-C, SIGTERM and SIGUSR1 are passed on, and what the command
makes of them is the end. No process of the command outlives this one (on Linux).

Hosts may have a supervisor each, as launch/tpu.sh gives them; --host says which it is. When one process is gone the
others end by themselves, and all meet again. Its report is then supervisor-HOST.json; host 0 alone writes incidents.
One whose report says that it has ended is not waited for: the others end as it did, before they would start again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import descent
from heartbeats import Heartbeats, furthest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vidgen.secrets import redacted  # noqa: E402

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that are passed on
STOPPED = {128 + number for number in SIGNALS}  # exit status of a run that was asked to stop
USER = 2  # exit status of what the user can mend
LONGEST = 30.0  # seconds between two attempts
LOOK = 5.0  # seconds after which, between two attempts, the reports of other hosts are read again
ENOUGH = 300.0  # seconds after a signal was passed on; what has not ended then is killed
TAIL = 15  # last lines of an attempt that are kept
KEPT = 100  # attempts in supervisor.json


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How an attempt went: when it began, in seconds since 1970, how long it took, its exit status, how it ended in
    words, the furthest step that it or one before it is known to have reached, whether that is further than before, and
    its last lines.
    """

    began: float
    seconds: float
    status: int
    how: str
    step: int
    further: bool
    log: tuple[str, ...]

    def told(self) -> str:
        """In one line."""
        return f"{self.how} after {self.seconds:.0f} s, at step {self.step}"


def main() -> int:
    """Parses the command line and runs it; the exit status."""
    options, command = parse(sys.argv[1:])
    if options.dry_run:
        print(shlex.join(command))
        return 0
    try:
        options.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return fail(f"--workdir={options.workdir}: {e.strerror}; expected a directory that can be written")
    return Supervisor(command, options.workdir, options.restarts, options.hang, options.host).run()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, the command to run); exits with 2 and one line for what can't be used."""
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        usage="python launch/supervise.py [--restarts N] [--hang SECONDS] [--host N] [--dry_run] -- COMMAND …",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "in a row that bring the run no further, before it gives up; 10 unless given"
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help=help)
    help = "without progress, after which the run is killed and started again; 900 unless given, 0: never"
    parser.add_argument("--hang", type=float, default=900.0, metavar="SECONDS", help=help)
    help = "number of this host, where each has a supervisor of its own"
    parser.add_argument("--host", type=int, metavar="N", help=help)
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and end")
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    for name in ("restarts", "hang"):
        if not getattr(options, name) >= 0:
            sys.exit(fail(f"--{name}={getattr(options, name)}: expected 0 or more"))
    if not command:
        sys.exit(fail("nothing to run: expected -- and a command, as in -- vidgen train --config … --workdir …"))
    given = [
        value if name == "--workdir" else name.partition("=")[2]
        for name, value in zip(command, [*command[1:], ""], strict=True)
        if name == "--workdir" or name.startswith("--workdir=")
    ]
    if not given or not given[-1]:
        sys.exit(fail("the command has no --workdir, where its heartbeats and checkpoints are"))
    options.workdir = pathlib.Path(given[-1])
    program = [sys.executable] if command[0].endswith(".py") else []
    if not (os.path.exists(command[0]) if program else shutil.which(command[0])):
        sys.exit(fail(f"{command[0]}: not found; expected a program, or a script that ends with .py"))
    return options, [*program, *command]


class Supervisor:
    """A command and what became of its attempts; see the top of this file."""

    def __init__(self, command: list[str], workdir: pathlib.Path, restarts: int, hang: float, host: int | None):
        self.command, self.workdir, self.restarts, self.hang, self.host = command, workdir, restarts, hang, host
        self.attempts: list[Attempt] = []
        self.process: subprocess.Popen | None = None
        self.asked: list[int] = []  # signals that came
        self.pending: collections.deque[int] = collections.deque()  # those of them that are still to be passed on
        self.until = float("inf")  # when what was asked to stop is killed
        self.others = Others(workdir, host)

    def run(self) -> int:
        """Runs it to its end; the exit status."""
        descent.adopt()
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        self._write("running")  # or others would read how an earlier run ended
        best, failed = furthest(self.workdir, {}), 0  # failed: restarts in a row that brought it no further
        while True:
            self.attempts.append(self._attempt(best))
            last = self.attempts[-1]
            best, failed = last.step, 0 if last.further else failed
            if last.status == 0:
                return self._ended("done", 0)
            if self.asked or last.status in STOPPED:
                return self._ended("stopped", last.status)
            if last.status == USER:
                return self._ended("for the user to mend", USER)
            if (status := self._told()) is not None:
                return status
            if failed >= self.restarts:
                self._ended("given up", last.status)
                return self._report(failed)
            failed += 1
            wait = min(2.0 ** (failed - 1), LONGEST)
            text = f"{last.told()}; started again in {wait:.0f} s ({failed} of {self.restarts} without progress)"
            self._write("running")
            self._incident(last.step, text)
            say(text)
            if (status := self._pause(wait)) is not None:
                return status

    def _attempt(self, best: int) -> Attempt:
        """Runs the command once. `best`: the furthest step known before."""
        began, clock = time.time(), time.monotonic()
        beats = Heartbeats(self.workdir, self.hang, "train" in self.command)
        process = self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"VIDGEN_RESTARTS": str(len(self.attempts))},
            start_new_session=True,  # a Ctrl-C on the terminal comes once, through this process
            preexec_fn=descent.bound(),
        )
        self._forward()  # what came while it was being started
        output, hung = Output(process), ""
        while process.poll() is None:
            output.copy(0.2)
            if time.monotonic() > self.until:
                hung = f"did not end within {ENOUGH:.0f} s of {signal.Signals(self.asked[0]).name}, and was killed"
            elif not self.asked:
                hung = beats.hung() or beats.left()
            if hung:
                break
        # What a shell script has started may still be saving.
        while self.asked and not hung and descent.descendants(os.getpid()) and time.monotonic() < self.until:
            output.copy(0.2)
        descent.end_all(process.pid)
        process.wait()
        descent.reap()
        output.copy(0.0)
        output.close()
        status = 128 - process.returncode if process.returncode < 0 else process.returncode
        if hung:
            status = 128 + self.asked[0] if self.asked else 0 if beats.done else os.EX_TEMPFAIL
        how = hung or f"ended with exit status {status}"
        if not hung and process.returncode < 0:
            how = f"was ended by {signal.Signals(-process.returncode).name}"
        beats.look()
        step = max(best, furthest(self.workdir, beats.seen))
        return Attempt(began, time.monotonic() - clock, status, how, step, step > best, output.last())

    def _pause(self, seconds: float) -> int | None:
        """Waits; the exit status where a signal, or what another host says, is the end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            look = min(time.monotonic() + LOOK, until)
            while time.monotonic() < look and not self.asked:
                time.sleep(0.05)
            if self.asked:
                return self._ended("stopped", 128 + self.asked[0])
            if (status := self._told()) is not None:
                return status
        return None

    def _told(self) -> int | None:
        """The exit status where the run has ended on another host, without which it can't go on here."""
        for host, report in sorted(self.others.ended().items()):
            outcome, last = report["outcome"], report["attempts"][-1]["how"]
            say(f"the supervisor of host {host} has ended: {outcome}; its last attempt {last}. This one ends too")
            return self._ended(outcome, report["status"])
        return None

    def _pass_on(self, number: int, _frame: object) -> None:
        self.asked.append(number)
        self.pending.append(number)
        self.until = min(self.until, time.monotonic() + ENOUGH)
        self._forward()

    def _forward(self) -> None:
        if self.process and self.process.returncode is None:
            with contextlib.suppress(OSError, IndexError):
                while True:
                    os.killpg(self.process.pid, self.pending.popleft())

    def _ended(self, outcome: str, status: int) -> int:
        self._write(outcome, status)
        last = self.attempts[-1]
        if len(self.attempts) > 1 or status == USER or last.how != f"ended with exit status {status}":
            say(f"{outcome}, after {len(self.attempts)} attempts; the last {last.told()}")
        return status

    def _report(self, failed: int) -> int:
        """Says how the attempts went; the exit status."""
        last = self.attempts[-1]
        say(f"given up: {failed} restarts brought it no further than step {last.step}:")
        for n, attempt in list(enumerate(self.attempts, 1))[-KEPT:]:
            print(f"  attempt {n} {attempt.told()}", file=sys.stderr)
        print("the last one's last words:", *redacted(last.log), sep="\n  ", file=sys.stderr)
        return last.status

    def _write(self, outcome: str, status: int | None = None) -> None:
        """The report, without credentials; a disk that refuses it is said, and changes nothing. `status`: of this one's
        exit, where it ends.
        """
        found = {"command": shlex.join(self.command), "outcome": outcome, "status": status}
        found["restarts"] = max(len(self.attempts) - 1, 0)
        found["attempts"] = [dataclasses.asdict(attempt) for attempt in self.attempts[-KEPT:]]
        path = self.workdir / ("supervisor.json" if self.host is None else f"supervisor-{self.host}.json")
        try:
            path.with_suffix(".tmp").write_text(json.dumps(redacted(found), indent=1) + "\n", encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as e:
            say(f"{path}: {e.strerror}; it is not written")

    def _incident(self, step: int, text: str) -> None:
        if self.host:
            return  # host 0 tells of the same
        row = {"time": round(time.time(), 3), "step": step, "kind": "restart", "text": text}
        with contextlib.suppress(OSError), open(self.workdir / "incidents.jsonl", "a+b") as f:
            if f.tell():  # a row may have been cut short when its writer was killed
                f.seek(-1, os.SEEK_END)
                f.write(b"" if f.read(1) == b"\n" else b"\n")
            f.write(json.dumps(row).encode() + b"\n")


class Others:
    """The supervisors of other hosts; none where this one is of no host, or the workdir is not one that all see."""

    def __init__(self, workdir: pathlib.Path, host: int | None):
        self._workdir, self._host = workdir, host
        self._before = self._read()

    def ended(self) -> dict[int, dict[str, Any]]:
        """{host: its report} of those that have ended since this one began; clocks of hosts may differ."""
        found = self._read()
        return {n: r for n, r in found.items() if r["status"] is not None and r != self._before.get(n)}

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for path in self._workdir.glob("supervisor-*.json") if self._host is not None else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                host, report = int(path.stem.partition("-")[2]), json.loads(path.read_text(encoding="utf-8"))
                if host != self._host and (report["status"] is None or report["attempts"][-1]["how"]):
                    found[host] = report
        return found


class Output:
    """What a process says: passed on, and its last lines kept."""

    def __init__(self, process: subprocess.Popen):
        self._sources = (process.stdout, process.stderr)
        self._selector = selectors.DefaultSelector()
        for source, terminal in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            os.set_blocking(source.fileno(), False)
            self._selector.register(source, selectors.EVENT_READ, terminal)
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._rest = b""  # of a line that isn't over

    def copy(self, seconds: float) -> None:
        """Passes on what there is, or what comes within some seconds."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return
        while ready := self._selector.select(seconds):
            for key, _ in ready:
                data = os.read(key.fileobj.fileno(), 1 << 16)
                if not data:
                    self._selector.unregister(key.fileobj)
                    continue
                with contextlib.suppress(OSError, ValueError):  # the terminal has gone
                    key.data.buffer.write(data)
                    key.data.buffer.flush()
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._tail.extend(line.decode(errors="replace")[-1000:] for line in lines)
            seconds = 0.0
            if not self._selector.get_map():
                return

    def last(self) -> tuple[str, ...]:
        """The last lines."""
        rest = [self._rest.decode(errors="replace")[-1000:]] if self._rest else []
        return tuple([*self._tail, *rest][-TAIL:])

    def close(self) -> None:
        """Ends it, though a process may hold the other end."""
        self._selector.close()
        for source in self._sources:
            source.close()


def say(text: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError):
        print(f"supervise.py: {text}", file=sys.stderr, flush=True)


def fail(message: str) -> int:
    """Says what is wrong; the exit status for it."""
    say(f"error: {message}")
    return USER


if __name__ == "__main__":
    sys.exit(main())
