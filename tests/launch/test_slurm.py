"""launch/slurm.sh under a real Slurm of two nodes on this machine: a job loses a process, then is asked to save, starts
again by itself each time and goes on bit for bit. What needs no cluster is tested without one."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import config_file, make_tiny, processes
from slurm_cluster import _ports, slurm  # noqa: F401 - the fixture

from vidgen.training import metrics
from vidgen.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "slurm.sh")
STEPS = 300


def sh(*arguments, env=None, cwd=None):
    """(status, stdout, stderr) of slurm.sh."""
    env = {"PYTHON": sys.executable} | (os.environ if env is None else env)
    done = subprocess.run(["bash", SCRIPT, *map(str, arguments)], env=env, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    c = make_tiny()
    c.model.update(layers=1, unroll=1)
    c.text.layers = 0
    c.optimizer.name = "adamw"
    c.train.update(steps=STEPS, log_every=1, checkpoint_every=50)
    return config_file(folder, c)


def saved(workdir, step):
    """Every array of a checkpoint, by name."""
    checkpoints = Checkpoints(str(workdir), read_only=True)
    try:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the devices of the two processes aren't
        restore = ocp.args.StandardRestore(fallback_sharding=here)
        items = checkpoints._manager.restore(step, args=ocp.args.Composite(state=restore, ema=restore))
        leaves = jax.tree_util.tree_leaves_with_path({"state": items["state"], "ema": items["ema"]})
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    finally:
        checkpoints.close()


def last_step(workdir):
    return max((row["step"] for row in metrics.read(str(workdir))), default=0)


def pid_of(rank, workdir):
    """The process of this rank that trains in a workdir."""
    for pid, (command, env) in processes(workdir).items():
        if "vidgen.cli" in command and "srun" not in command and env.get("SLURM_PROCID") == str(rank):
            return pid
    raise AssertionError(f"no process {rank} trains in {workdir}")


def test_a_job_that_is_killed_and_asked_to_save_starts_again_bit_for_bit(slurm, tiny_file, tmp_path):  # noqa: F811
    # Nodes of a real cluster have names that resolve.
    env = slurm.environment | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{_ports(1)[0]}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a third of the time, at each of four starts
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    def submit(name):
        workdir = tmp_path / name
        train = ("train", "--config", tiny_file, "--workdir", workdir)
        status, out, err = sh("--nodes=2", "--time=10", "--signal=USR1@60", "--", *train, env=env)
        assert (status, out) == (0, ""), err
        return workdir, (workdir / "slurm_job").read_text().strip()

    def logs(workdir):
        return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in sorted((workdir / "logs").iterdir()))

    def ended(job):
        return slurm.fact(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    straight, job = submit("straight")
    slurm.wait(lambda: ended(job), 240, lambda: logs(straight))
    assert slurm.fact(job, "JobState") == "COMPLETED", logs(straight)

    stopped, job = submit("stopped")
    slurm.wait(lambda: last_step(stopped) > 60 or ended(job), 240, lambda: logs(stopped))
    os.kill(pid_of(1, stopped), signal.SIGKILL)
    killed = last_step(stopped)  # or a step before
    slurm.wait(lambda: last_step(stopped) > killed + 1 or ended(job), 240, lambda: logs(stopped))
    slurm("scancel", "--signal=USR1", job)
    again = sh("--", "train", "--config", tiny_file, "--workdir", stopped, env=env)
    assert again[0] == 2 and f"job {job} is there already; stop it first: bash launch/slurm.sh --stop" in again[2]
    slurm.wait(lambda: ended(job), 240, lambda: logs(stopped))
    assert slurm.fact(job, "JobState") == "COMPLETED" and slurm.fact(job, "Restarts") == "1", logs(stopped)

    lead, other, own = ((stopped / "logs" / f"{name}.log").read_text() for name in ("rank-0", "rank-1", f"slurm-{job}"))
    assert "started again in 1 s (1 of 10 without progress)" in own
    assert json.loads((stopped / "supervisor.json").read_text())["outcome"] == "done"  # of the job's second life
    assert "Stopped by SIGUSR1 after step" in lead and "SIGUSR1: stopping after a step and saving" in lead + other
    assert f"job {job} was asked to end, has saved, and goes back to the queue" in own
    a, b = metrics.read(str(straight)), metrics.read(str(stopped))
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in a] == [row["loss"] for row in b]
    a, b = saved(straight, STEPS), saved(stopped, STEPS)
    assert a.keys() == b.keys() and any("opt_state" in name for name in a) and any("ema" in name for name in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def stand_in(folder, body):
    """A Python whose `-m vidgen.cli` is a few lines of shell."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\n[ "$1" = -m ] || exec {sys.executable} "$@"\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_told_to_stop_a_job_saves_and_does_not_come_again(slurm, tmp_path):  # noqa: F811
    # Its workdir is its last argument; one takes longer than the other.
    saves = 'trap "" TERM USR1; mkdir -p "${@: -1}/checkpoints/1"; sleep $SLURM_PROCID; echo saved; exit 143'
    waits = f"trap '{saves}' TERM USR1; echo ready; while :; do sleep 0.1; done"
    env = slurm.environment | {"PYTHON": stand_in(tmp_path, waits)}
    w = tmp_path / "my run"
    assert sh("--nodes=2", "--", "train", "--workdir", w, env=env)[0] == 0
    job, logs = (w / "slurm_job").read_text().strip(), [w / "logs/rank-0.log", w / "logs/rank-1.log"]
    slurm.wait(lambda: all(log.exists() and "ready" in log.read_text() for log in logs), 20, lambda: str(logs))
    held = sh("--nodes=2", "--begin=now+1hour", "--", "train", "--workdir", tmp_path / "held", env=env)
    assert held[0] == 0, held
    for workdir in (w, tmp_path / "held"):
        assert sh("--stop", "--workdir", workdir, env=env) == (0, "", "")
    held = (tmp_path / "held/slurm_job").read_text().strip()
    slurm.wait(lambda: not slurm("squeue", "-h", f"--jobs={job},{held}"), 20, lambda: slurm("squeue"))
    assert all(log.read_text().endswith("saved\n") for log in logs)
    assert slurm.fact(job, "ExitCode") == "143:0" and slurm.fact(held, "JobState") == "CANCELLED"
    assert slurm.fact(job, "Restarts") == "0"
    status, _, err = sh("--stop", "--workdir", w, env=env)
    assert status == 2 and err == f"slurm.sh: error: {w}: its job {job} has ended already\n"


def test_preempted_a_job_saves_and_comes_again_and_cancelled_it_does_not(slurm, tmp_path):  # noqa: F811
    first = '[ -z "${SLURM_RESTART_COUNT:-}" ]'
    waits = f"trap 'echo saved; exit 143' TERM USR1; echo ready; while {first}; do sleep 0.1; done"
    env = slurm.environment | {"PYTHON": stand_in(tmp_path, waits)}
    jobs = {}
    for name, node in (("preempted", "n1"), ("cancelled", "n2")):
        assert sh(f"--nodelist={node}", "--", "train", "--workdir", tmp_path / name, env=env)[0] == 0
        jobs[name] = (tmp_path / name / "slurm_job").read_text().strip()

    def own(name):  # lines of what ran, without Slurm's
        log = tmp_path / name / "logs/rank-0.log"
        return [line for line in log.read_text().split() if line in ("ready", "saved")] if log.exists() else []

    def queue():
        return "\n".join([slurm("squeue"), *(log.read_text() for log in tmp_path.glob("*/logs/*.log"))])

    slurm.wait(lambda: all(own(name) for name in jobs), 20, queue)
    slurm.preempt("n1")
    slurm("scancel", jobs["cancelled"])
    slurm.wait(lambda: not slurm("squeue", "-h", f"--jobs={','.join(jobs.values())}"), 40, queue)
    assert own("preempted") == ["ready", "saved", "ready"] and own("cancelled") == ["ready", "saved"], queue()
    states = [[slurm.fact(job, fact) for fact in ("JobState", "Restarts")] for job in jobs.values()]
    assert states == [["COMPLETED", "1"], ["CANCELLED", "0"]]
    logs = [(tmp_path / name / f"logs/slurm-{job}.log").read_text() for name, job in jobs.items()]
    assert f"job {jobs['preempted']} was asked to end, has saved, and goes back to the queue" in logs[0]
    assert f"job {jobs['cancelled']} ended with exit status 143" in logs[1]


def test_between_two_attempts_a_job_hears_that_it_is_to_end(slurm, tmp_path):  # noqa: F811
    fails = '[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0; mkdir -p "${@: -1}/checkpoints/1"; exit 1'
    env = slurm.environment | {"PYTHON": stand_in(tmp_path, fails)}
    jobs = {}
    for name in ("late", "stopped"):
        assert sh("--", "train", "--workdir", tmp_path / name, env=env)[0] == 0
        jobs[name] = (tmp_path / name / "slurm_job").read_text().strip()

    def attempts(name):
        path = tmp_path / name / "supervisor.json"
        return len(json.loads(path.read_text())["attempts"]) if path.exists() else 0

    def told():
        return slurm("squeue") + "".join(log.read_text() for log in tmp_path.glob("*/logs/*.log"))

    slurm.wait(lambda: all(attempts(name) > 1 for name in jobs), 30, told)  # they wait for some seconds now
    slurm("scancel", "--batch", "--signal=USR1", jobs["late"])  # as --signal=B:USR1@300 has it, half a minute late
    assert sh("--stop", "--workdir", tmp_path / "stopped", env=env) == (0, "", "")
    slurm.wait(lambda: not slurm("squeue", "-h", f"--jobs={','.join(jobs.values())}"), 60, told)
    facts = [[slurm.fact(job, fact) for fact in ("JobState", "ExitCode", "Restarts")] for job in jobs.values()]
    assert facts == [["COMPLETED", "0:0", "1"], ["FAILED", "138:0", "0"]], told()
    assert json.loads((tmp_path / "stopped/supervisor.json").read_text())["outcome"] == "stopped"


def test_what_fails_and_what_saves_nothing_is_not_started_again(slurm, tmp_path):  # noqa: F811
    nothing = "before it had saved anything, and is not started again"
    jobs = {}
    for status in (2, 138, 143):
        (tmp_path / str(status)).mkdir()
        env = slurm.environment | {"PYTHON": stand_in(tmp_path / str(status), f"exit {status}")}
        assert sh("--", "train", "--workdir", tmp_path / str(status), env=env)[0] == 0
        jobs[status] = (tmp_path / str(status) / "slurm_job").read_text().strip()
    for (status, job), says in zip(jobs.items(), ("ended with exit status 2", nothing, nothing), strict=True):
        slurm.wait(lambda: slurm.fact(job, "JobState") == "FAILED", 20, lambda: slurm("scontrol", "show", "job", job))  # noqa: B023
        assert slurm.fact(job, "ExitCode") == f"{status}:0" and slurm.fact(job, "Restarts") == "0"
        assert says in (tmp_path / str(status) / f"logs/slurm-{job}.log").read_text()


def test_what_sbatch_refuses_is_told(slurm, tmp_path):  # noqa: F811
    status, _, err = sh("--partition=gpu", "--", "train", "--workdir", tmp_path / "w", env=slurm.environment)
    assert (
        status == 2
        and "invalid partition specified: gpu" in err
        and err.endswith("sbatch refused the job, see above\n")
    )


def test_a_dry_run_prints_what_would_be_submitted_and_run(tmp_path):
    w = tmp_path / "my run"
    arguments = (
        "--topology=h100:4x8",
        "--time=1:00:00",
        "--dry_run",
        "--",
        "train",
        "--config",
        "c.py",
        "--workdir",
        w,
    )
    status, out, err = sh(*arguments)
    assert (status, err) == (0, "") and not w.exists()
    lines = out.splitlines()
    quoted = str(w).replace(" ", "\\ ")
    assert lines[0] == f"mkdir -p {quoted}/logs"
    for words in ("--requeue --signal=B:USR1@300", "--time=1:00:00 --nodes=4 --gpus-per-node=8 --ntasks-per-node=8"):
        assert words in lines[1]
    assert lines[1].startswith("sbatch --parsable --job-name=vidgen-my\\ run --requeue") and "--in_job" in lines[1]
    assert "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in lines
    run = f"{sys.executable} -m vidgen.cli train --config c.py --workdir {quoted}"
    supervised = f"{sys.executable} {ROOT}/launch/supervise.py -- srun --kill-on-bad-exit=0"
    assert lines[-1].startswith(supervised) and lines[-1].endswith(run) and lines[1].endswith(run)

    per_node = [
        sh(*more, "--dry_run", "--", "train", "--workdir", "w")[1] for more in ((), ("--gpus-per-node=h100:2",))
    ]
    assert "--ntasks-per-node=1 " in per_node[0] and "--ntasks-per-node=2 " in per_node[1]
    for signal_ in (("--signal=USR1@60",), ("--signal", "USR1@60"), ("--signal=B:USR1@60",)):
        assert " --signal=B:USR1@60 " in sh(*signal_, "--dry_run", "--", "train", "--workdir", "w")[1]
    own = sh("--gpus-per-node", "4", "--ntasks-per-node=1", "--dry_run", "--", "train", "--workdir", "w")[1]
    for more in (("--gres=gpu:4", "-n8"), ("-n", "8"), ("--ntasks-per-node=4", "--gres=gpu:4")):
        assert "--ntasks-per-node=1 " not in sh(*more, "--dry_run", "--", "train", "--workdir", "w")[1]
    assert own.splitlines()[1].count("ntasks") == 1 and "--gpus-per-node 4 --ntasks-per-node=1 " in own


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nodes=2",), "nothing to run: expected -- and a verb of vidgen"),
        (("--nodes=2", "--", "train", "--config", "c.py"), "--workdir is missing"),
        (
            ("--dry_run", "--", "train", "--workdir=gs://b/c"),
            "--workdir=gs://b/c: expected a directory that all nodes see",
        ),
        (
            ("--dry_run", "--topology=h100:4x9", "--", "train", "--workdir=w"),
            "--topology=h100:4x9: a host has 1, 2, 4 or",
        ),
        (
            ("--dry_run", "--topology", "v5p:4x8x8", "--", "train", "--workdir=w"),
            "expected GPUs, hosts x GPUs like h100:4x8",
        ),
        (("--topology",), "--topology: expected a value"),
        (("--dry_run", "--gres=gpu:4", "--", "train", "--workdir=w"), "--gres=gpu:4: expected --gpus-per-node=N"),
        (("--dry_run", "-G8", "--nodes=2", "--", "train", "--workdir=w"), "-G8: expected --gpus-per-node=N"),
        (("--stop", "--dry_run", "--workdir=w"), "w/slurm_job: no such file; no job was started for this workdir"),
    ],
)
def test_bad_calls(arguments, says, tmp_path):
    status, out, err = sh(*arguments, cwd=tmp_path)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_slurm_it_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat"):
        (tools / tool).symlink_to(next(f"{p}/{tool}" for p in ("/usr/bin", "/bin") if os.path.exists(f"{p}/{tool}")))
    done = sh("--", "train", "--workdir", "w", env={"PATH": str(tools)}, cwd=tmp_path)
    assert done == (2, "", "slurm.sh: error: sbatch is not on PATH: is this a login node of a Slurm cluster?\n")


def test_help_teaches():
    status, out, _ = sh("--help")
    assert status == 0 and "set -euo" not in out
    for words in ("bash launch/slurm.sh --nodes=4 --gpus-per-node=8", "--stop", "--dry_run", "goes on bit for bit"):
        assert words in out
