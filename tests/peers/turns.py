"""Two programs side by side: each a process of its own, pinned to the same cores, asked in turns.

A script that measures calls itself again as a child for each implementation; the child answers lines on its standard
input with one JSON value each.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

REST = 0.5  # seconds between turns, for the other's threads to stop spinning


class Child:
    """A process that has one implementation loaded and does what it is asked, one line each."""

    def __init__(self, script, name, python, cores, arguments):
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [python, script, "--child", name, "--cores", str(cores), *arguments]
        environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(cores)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._name = name
        self.words = self.ask("ready")

    def ask(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._name} ended at {line!r}; its error is above")
        return json.loads(answer)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def in_turns(children, questions, repeats):
    """{child: {question: [answer, …]}}: every child is asked every question, in turns."""
    found = {name: {question: [] for question in questions} for name in children}
    for _ in range(repeats):
        for question in questions:
            for name, child in children.items():
                time.sleep(REST)
                found[name][question].append(child.ask(question))
    return found


def serve(cores, load):
    """A child's life: `load() -> (answer, words)`; then each line is answered by `answer(*its words)`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    answer, words = load()
    for line in sys.stdin:
        what = line.split()
        print(json.dumps(words if what == ["ready"] else answer(*what)), flush=True)


def timed(call):
    """[wall, CPU] seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def tidy():
    """Frees what nobody holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def most_resident(call):
    """The most memory that the process has during a call, in KiB."""
    tidy()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    call()
    return status("VmHWM")


def status(key):
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])
