"""Runs of a sweep as processes: who is alive, and who is told to stop, whoever started it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vidgen.config import ConfigError
from vidgen.parallel.processes import Restartable
from vidgen.scaling.local import Local
from vidgen.training import resilience
from vidgen.training.resilience import holder, only_one

WAITS = """
import signal, sys, time
from vidgen.training.resilience import only_one
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
with only_one("job"):
    print("ready", flush=True)
    time.sleep(60)
"""


def wait(until):
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A process in its own session that holds the lock of a run, as an earlier driver left it."""
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", WAITS], start_new_session=True)
    wait(lambda: holder("job"))
    yield process
    process.kill()
    process.wait()


def test_who_holds_a_workdir_is_known_while_it_does(tmp_path, monkeypatch, capsys):
    workdir = str(tmp_path / "w")
    assert holder(workdir) is None
    with only_one(workdir):
        assert (tmp_path / "w/lock").read_text().isdigit() and holder(workdir)
        with pytest.raises(ConfigError, match="another vidgen is at work there"), only_one(workdir):
            pass
        assert holder(workdir)  # who was refused has not wiped the number out
        # One that is started again waits for the one before, which may be dying still.
        monkeypatch.setenv("VIDGEN_RESTARTS", "1")
        monkeypatch.setattr(resilience, "PATIENCE", 0.3)
        with pytest.raises(Restartable, match="another vidgen is at work there"), only_one(workdir):
            pass
        assert capsys.readouterr().err.count("another vidgen is at work there; waiting up to 0.3 s for it to end") == 1
    assert holder(workdir) is None


def test_a_run_that_two_drivers_started_is_stopped_where_it_is_at_work(job, tmp_path):
    jobs = Local(1)
    second = jobs.start("run", [sys.executable, "-c", WAITS], str(tmp_path))
    assert jobs.alive([second]) == {second}
    wait(lambda: "another vidgen is at work" in (tmp_path / "log.txt").read_text())
    wait(lambda: jobs.alive([second]) and not jobs._children)  # it has ended, and the run is at work all the same
    jobs.stop(second)
    assert job.wait(30) == 128 + signal.SIGTERM
    assert jobs.alive([second]) == set()
    jobs.stop(second)  # nobody is told, whoever has the number now


def test_cores_are_shared(tmp_path):
    jobs = Local(2)
    show = [sys.executable, "-c", "import os, time; time.sleep(1); print(sorted(os.sched_getaffinity(0)))"]
    handles = [jobs.start(name, show, str(tmp_path / name)) for name in "ab"]
    wait(lambda: not jobs.alive(handles))
    a, b = ((tmp_path / name / "log.txt").read_text() for name in "ab")
    assert a != b or len(os.sched_getaffinity(0)) == 1
