"""A run of two processes, each under a supervisor of its own, that loses one to SIGKILL and another to SIGSTOP ends as
one that was not disturbed, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import config_file, make_tiny, ranks

from vidgen.parallel import mesh as meshes
from vidgen.training import metrics
from vidgen.training.checkpoint import Checkpoints
from vidgen.training.program import build

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

import local  # noqa: E402

STEPS = 120


def config():
    c = make_tiny()
    c.model.update(layers=1, unroll=1)
    c.text.layers = 0
    c.optimizer.name = "adamw"  # compiles in half the time
    c.train.update(steps=STEPS, log_every=1, checkpoint_every=20, hang=20.0)
    return c


def supervised(folder, name, options, run, environment):
    """A run that is started again; what it says is in WORKDIR/said.log."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a third of the time
    }
    train = ["train", "--config", config_file(folder, config()), "--workdir", folder / name]
    command = [sys.executable, LAUNCH / "supervise.py", "--hang=35", *options, "--", *run, *train]
    (folder / name).mkdir(exist_ok=True)
    with open(folder / name / "said.log", "ab") as log:
        env = os.environ | cache | environment
        return subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=env)


def together(folder, name):
    """Two processes under one supervisor."""
    return [supervised(folder, name, [], [LAUNCH / "local.py", "--processes=2", "--"], {})]


def apart(folder, name):
    """Two processes, each under a supervisor of its own, as on two hosts."""
    port = local.free_port()
    run = [sys.executable, "-m", "vidgen.cli"]
    return [supervised(folder, name, [f"--host={n}"], run, local.environment(n, 2, 1, port)) for n in range(2)]


def end(supervisors, workdir):
    """Waits for them, and leaves nothing behind."""
    try:
        for supervisor in supervisors:
            supervisor.wait(400)
    finally:
        for supervisor in supervisors:
            supervisor.terminate()
    assert [supervisor.returncode for supervisor in supervisors] == [0] * len(supervisors), said(workdir)
    assert not ranks(workdir)


def said(workdir):
    return (workdir / "said.log").read_text()


def reached(workdir, step, supervisors):
    """Waits until the run has come to a step."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert all(supervisor.poll() is None for supervisor in supervisors), said(workdir)
        rows = metrics.read(str(workdir))
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"not at step {step} in time")


def arrays(workdir):
    """All of the last checkpoint."""
    c = config()
    c.mesh.update(data=2, fsdp=2)
    like = build(c, meshes.make_mesh(c.mesh, c.rows.count, c.rows.tokens)).state_like
    checkpoints = Checkpoints(str(workdir), read_only=True)
    assert checkpoints.latest == STEPS
    state = checkpoints.restore(STEPS, like)
    checkpoints.close()
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_a_killed_and_a_stopped_process_change_no_bit(tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    end(together(tmp_path, "calm"), calm)
    assert json.loads((calm / "supervisor.json").read_text())["restarts"] == 0

    supervisors = apart(tmp_path, "rough")
    try:
        reached(rough, 30, supervisors)
        os.kill(ranks(rough)[1], signal.SIGKILL)
        time.sleep(3)  # until the rest of it is gone
        reached(rough, 70, supervisors)
        os.kill(ranks(rough)[0], signal.SIGSTOP)
    finally:
        end(supervisors, rough)
    told = [json.loads((rough / f"supervisor-{n}.json").read_text()) for n in range(2)]
    statuses = [[attempt["status"] for attempt in one["attempts"]] for one in told]
    assert [one["outcome"] for one in told] == ["done", "done"], told
    assert statuses[1][0] == 137 and statuses[0][0] not in (0, 137), "one was killed, the other could not go on alone"
    assert 75 in statuses[1] and any("hung, process 0" in attempt["how"] for attempt in told[0]["attempts"]), told
    assert "process 1 of 2: nothing has moved for " in said(rough) and "process 0 (pid " in said(rough)

    for mine, other in zip(arrays(rough), arrays(calm), strict=True):
        np.testing.assert_array_equal(mine, other)
    losses = [[row["loss"] for row in metrics.read(str(workdir))] for workdir in (calm, rough)]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
