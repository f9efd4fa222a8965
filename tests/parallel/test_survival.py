"""A run of two processes that loses one to SIGKILL and another to SIGSTOP ends as if undisturbed, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import make_tiny

from vidgen.config import to_json
from vidgen.parallel import mesh as meshes
from vidgen.training import metrics
from vidgen.training.checkpoint import Checkpoints
from vidgen.training.program import build

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
STEPS = 120


def config():
    c = make_tiny()
    c.model.update(layers=1, unroll=1)
    c.text.layers = 0
    c.optimizer.name = "adamw"  # compiles in half the time
    c.train.update(steps=STEPS, log_every=1, checkpoint_every=20, hang=20.0)
    return c


def started(folder, name):
    """A run under the supervisor."""
    (folder / "c.json").write_text(to_json(config()))
    (folder / "c.py").write_text(
        "import pathlib\n\nfrom vidgen import config\n\n\n"
        "def get_config(arg=''):\n"
        "    return config.from_json((pathlib.Path(__file__).parent / 'c.json').read_text())\n"
    )
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    command = [sys.executable, LAUNCH / "supervise.py", "--hang=60", "--", LAUNCH / "local.py", "--processes=2", "--"]
    train = ["train", "--config", folder / "c.py", "--workdir", folder / name]
    return subprocess.Popen([*map(str, command), *map(str, train)], stderr=subprocess.PIPE, text=True, env=env)


def ranks(workdir):
    """{rank: its process} of the run that is at work there."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = str(workdir) in (path.parent / "cmdline").read_text()
            told = dict(x.partition("=")[::2] for x in path.read_text().split("\0"))
        except OSError:
            continue
        if ours and "VIDGEN_PROCESS" in told:
            found[int(told["VIDGEN_PROCESS"])] = int(path.parent.name)
    return found


def reached(workdir, step, process):
    """Waits until the run has come to a step, not by an earlier attempt."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
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
    calm = started(tmp_path, "calm")
    try:
        _, err = calm.communicate(timeout=400)
    finally:
        calm.terminate()
    assert calm.returncode == 0, err
    assert json.loads((tmp_path / "calm/supervisor.json").read_text())["restarts"] == 0

    workdir = tmp_path / "rough"
    rough = started(tmp_path, "rough")
    try:
        reached(workdir, 30, rough)
        os.kill(ranks(workdir)[1], signal.SIGKILL)
        time.sleep(3)  # until the rest of it is gone
        reached(workdir, 70, rough)
        os.kill(ranks(workdir)[0], signal.SIGSTOP)
        _, err = rough.communicate(timeout=400)
    finally:
        rough.terminate()
    assert rough.returncode == 0, err
    told = json.loads((workdir / "supervisor.json").read_text())["attempts"]
    assert [attempt["status"] for attempt in told[:2]] == [137, 75], told
    log = (workdir / "logs/rank-1.log").read_text()
    assert "process 1 of 2: nothing has moved for " in log and "process 0 (pid " in log
    assert not ranks(workdir)

    for mine, other in zip(arrays(workdir), arrays(tmp_path / "calm"), strict=True):
        np.testing.assert_array_equal(mine, other)
    losses = [[row["loss"] for row in metrics.read(str(tmp_path / name))] for name in ("calm", "rough")]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
