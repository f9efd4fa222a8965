"""Runs of a sweep as jobs of a real Slurm, through submitit."""

import json
import os
import pathlib
import sys

import pytest

pytest.importorskip("submitit", reason="the extra [slurm]")
TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "launch")]
from slurm_cluster import slurm  # noqa: E402, F401 - the fixture
from test_sweep import JOB, SWEEP  # noqa: E402 - a stand-in for a run, and a sweep over seeds

from vidgen import sweep  # noqa: E402
from vidgen.config import ConfigError  # noqa: E402
from vidgen.scaling import slurm as launcher  # noqa: E402

WAITS = """\
import os, signal, sys, time
def stop(number, frame):
    print('saved', number, flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
print('ready', flush=True)
if 'SLURM_RESTART_COUNT' not in os.environ:
    time.sleep(60)
print('done', flush=True)
"""


@pytest.fixture
def jobs(slurm, monkeypatch, tmp_path):  # noqa: F811
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    return launcher.Slurm({"time": 30, "cpus_per_task": 1, "partition": "all"})


def read(path):
    return path.read_text() if path.exists() else ""


def test_jobs_are_started_seen_and_stopped(slurm, jobs, tmp_path):  # noqa: F811
    says = jobs.start("says", [sys.executable, "-c", "print('hello'); import sys; sys.exit('and bye')"], "runs/says")
    waits = jobs.start("waits", [sys.executable, "-c", WAITS], "runs/waits")
    log = tmp_path / "runs/waits/log.txt"
    slurm.wait(lambda: "ready" in read(log), 40, lambda: slurm("squeue"))
    held = launcher.Slurm({"time": 30, "additional_parameters": {"begin": "now+1hour"}}).start(
        "held", ["true"], "runs/held"
    )
    slurm.wait(lambda: says not in jobs.alive([says]), 40, lambda: slurm("squeue"))
    assert jobs.alive([says, waits, held, "4711"]) == {waits, held}
    assert read(tmp_path / "runs/says/log.txt").splitlines() == ["hello", "and bye"]
    assert slurm.fact(says, "JobState") == "FAILED" and slurm.fact(waits, "JobName").startswith("waits-")
    assert jobs.start("waits", ["true"], "runs/waits") == waits  # which is there
    for handle in (waits, held, says):
        jobs.stop(handle)
    slurm.wait(lambda: not jobs.alive([waits, held]), 40, lambda: slurm("squeue"))
    assert read(log) == "ready\nsaved 15\n"  # asked once
    assert slurm.fact(held, "JobState") == "CANCELLED"


def test_a_job_whose_time_is_up_or_that_is_preempted_comes_again_under_its_number(slurm, jobs, tmp_path):  # noqa: F811
    handles = {}
    for name, node in (("long", "n2"), ("preempted", "n1"), ("cancelled", "n2")):
        here = launcher.Slurm({"time": 30, "additional_parameters": {"nodelist": node}})
        handles[name] = here.start(name, [sys.executable, "-c", WAITS], f"runs/{name}")
    long, preempted, cancelled = handles.values()

    def logs():
        return [read(tmp_path / "runs" / name / "log.txt") for name in handles]

    slurm.wait(lambda: all("ready" in log for log in logs()), 40, lambda: slurm("squeue"))
    slurm("scancel", "--signal=USR2", long)  # as Slurm does, signal_delay_s before the end
    slurm("scancel", cancelled)
    slurm.preempt("n1")
    slurm.wait(lambda: all("saved" in log for log in logs()), 20, lambda: str(logs()))
    while not all("done" in log for log in logs()[:2]):
        there = jobs.alive([long, preempted])
        assert all(name in there or "done" in log for name, log in zip((long, preempted), logs()[:2], strict=True))
    slurm.wait(lambda: not jobs.alive(handles.values()), 20, lambda: slurm("squeue"))
    again = "ready\nsaved {}\nready\ndone\n"
    assert logs() == [again.format(10), again.format(15), "ready\nsaved 15\n"]
    facts = [(slurm.fact(handle, "JobState"), slurm.fact(handle, "Restarts")) for handle in handles.values()]
    assert facts == [("COMPLETED", "1"), ("COMPLETED", "1"), ("CANCELLED", "0")]


def test_a_sweep_is_brought_to_its_end_by_jobs(slurm, jobs, monkeypatch, tmp_path, capsys):  # noqa: F811
    job, file, output = tmp_path / "job.py", tmp_path / "swept.py", tmp_path / "out"
    job.write_text("import os\nprint('job', os.environ['SLURM_JOB_ID'], flush=True)\n" + JOB)
    text = SWEEP.format(config=str(TESTS.parent / "configs/quickstart.py"), seeds=[0, 2])  # seed 2 fails at first
    file.write_text(text.replace("[0, 2])", "[0, 2]), options={'time': 30, 'partition': 'all'}"))
    monkeypatch.setattr(sweep, "JOB", (str(job),))
    monkeypatch.setattr(launcher.Slurm, "pause", 0.2)
    found = sweep.run(str(file), str(output), launcher="slurm", width=2)
    logs = [read(output / "runs" / name / "log.txt") for name in ("seed0", "seed2")]
    assert (found.done, found.failed, found.pending) == (2, 0, 0), logs
    assert "2 done, 0 failed, 0 to do" in capsys.readouterr().out
    assert sorted((output / "ledger").read_text().split()) == ["seed0", "seed2", "seed2"]
    assert [len(set(log.split("job ")[1:])) for log in logs] == [1, 2]  # a job a try
    assert json.loads((output / sweep.JOBS).read_text()) == {"launcher": "slurm", "jobs": {}}


def test_of_a_driver_that_is_killed_before_it_notes_a_job_the_next_one_takes_it(slurm, jobs, monkeypatch, tmp_path):  # noqa: F811
    job, file, output, go = (tmp_path / name for name in ("job.py", "swept.py", "out", "go"))
    job.write_text(JOB.replace("time.sleep(1.0)", f"\n    while not os.path.exists({str(go)!r}): time.sleep(0.1)"))
    text = SWEEP.format(config=str(TESTS.parent / "configs/quickstart.py"), seeds=[0])
    file.write_text(text.replace("[0])", "[0]), options={'time': 30}"))
    monkeypatch.setattr(sweep, "JOB", (str(job),))
    monkeypatch.setattr(launcher.Slurm, "pause", 0.2)
    start, handles = launcher.Slurm.start, []
    monkeypatch.setattr(launcher.Slurm, "start", lambda *given: handles.append(start(*given)) or handles[-1])

    class Killed(BaseException):
        """Ends the driver where it stands."""

    def kill(*_):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(sweep, "_keep", kill)
        sweep.run(str(file), str(output), launcher="slurm")
    slurm.wait((output / "ledger").exists, 40, lambda: slurm("squeue"))
    keep = sweep._keep
    monkeypatch.setattr(sweep, "_keep", lambda *given: (keep(*given), go.touch()))
    found = sweep.run(str(file), str(output), launcher="slurm", retries=0)
    assert (found.done, found.failed) == (1, 0) and handles[0] == handles[1]
    assert read(output / "ledger").split() == ["run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "the sweep's options for Slurm have no time: expected minutes"),
        ({"time": 5, "gpus_pernode": 2}, "unknown 'gpus_pernode'; did you mean gpus_per_node?"),
        ({"time": 5, "zzz": 2}, "unknown 'zzz'; known are"),
        ({"time": 5, "nodes": 2}, "nodes=2: expected 1, since a run of a sweep is one process"),
        ({"time": 5, "additional_parameters": {"ntasks-per-node": 4}}, "ntasks-per-node=4: expected 1"),
        ({"time": 5, "additional_parameters": ["--x"]}, "additional_parameters=.*: expected a dict"),
        ({"time": 5, "job_name": "a"}, "leave job_name out"),
        ({"time": 5, "setup": "module load cuda"}, "setup='module load cuda': expected a list of lines"),
    ],
)
def test_wrong_options_are_told_before_anything_begins(jobs, options, says):
    with pytest.raises(ConfigError, match=says):
        launcher.Slurm(options)


def test_what_sbatch_refuses_is_told_in_a_line(jobs):
    with pytest.raises(ConfigError, match="sbatch refused a: .*invalid partition specified: gpu") as e:
        launcher.Slurm({"time": 5, "partition": "gpu"}).start("a", ["true"], "runs/a")
    assert "\n" not in str(e.value)


def test_that_slurm_does_not_answer_is_not_taken_for_an_answer(jobs, monkeypatch, tmp_path):
    monkeypatch.setattr("vidgen.scaling.commands.time.sleep", lambda _: None)
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho x >>tries\necho 'Unable to contact slurm controller' >&2\nexit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="squeue .* failed: Unable to contact slurm controller"):
        jobs.alive(["1"])
    assert (tmp_path / "tries").read_text() == "x\n" * 4
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="squeue is not on PATH: is this a login node"):
        jobs.alive(["1"])
