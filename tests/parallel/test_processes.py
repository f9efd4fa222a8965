"""Several processes train as one: the same clips, noise and losses as one, and one end for all."""

import errno
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import config_file, make_tiny

from vidgen import train
from vidgen.config import ConfigError, to_json
from vidgen.parallel import processes
from vidgen.training import metrics
from vidgen.training.checkpoint import Checkpoints, check_config, write_config

ROOT = pathlib.Path(__file__).parents[2]
LAYOUT = pathlib.Path(__file__).parent / "layout.py"
STEPS = 20


def config(**mesh):
    c = make_tiny()
    c.model.update(layers=1, unroll=1)
    c.text.layers = 0
    c.optimizer.name = "adamw"  # compiles in half the time
    c.train.update(steps=STEPS, log_every=1, checkpoint_every=10)
    c.mesh.update(mesh)
    return c


def local(count, devices, *command, **options):
    """launch/local.py, started."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    launcher = [sys.executable, str(ROOT / "launch/local.py"), f"--processes={count}", f"--devices={devices}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env} | options
    return subprocess.Popen([*launcher, *map(str, command)], **options)


def saw(workdir, c, count, devices):
    """What the layout saw: clip ids, noise, and the loss of each step."""
    workdir.mkdir()
    (workdir / "c.json").write_text(to_json(c))
    arguments = [workdir / "c.json", workdir / "run"]
    if count == 1 and devices == jax.device_count():  # this process is such a layout
        spec = importlib.util.spec_from_file_location("layout", LAYOUT)
        layout = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(layout)
        layout.main(*map(str, arguments))
    else:
        process = local(count, devices, f"--logs={workdir}", "--", LAYOUT, *arguments)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    return json.loads((workdir / "run/seen.json").read_text()) | {"loss": losses(workdir / "run")}


def losses(workdir):
    rows = metrics.read(str(workdir))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "2x2"
    return folder / "run", saw(folder, config(data=1, fsdp=4), 2, 2)


@pytest.fixture(scope="module")
def one_by_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "1x4"
    return folder / "run", saw(folder, config(data=2, fsdp=2), 1, 4)


def test_two_processes_train_like_one_of_four_devices_and_one_of_one(two_by_two, one_by_four, tmp_path):
    _, two = two_by_two
    for other in (one_by_four[1], saw(tmp_path / "1x1", config(), 1, 1)):
        assert two["ids"] == other["ids"] and two["noise"] == other["noise"]
        np.testing.assert_allclose(two["loss"], other["loss"], rtol=1e-5)
    assert len({*two["noise"]}) == STEPS and np.ptp(two["loss"]) > 0.1  # there was something to compare


def test_each_shared_row_is_answered_for_once(two_by_two, one_by_four):
    for _, seen in (two_by_two, one_by_four):
        assert seen["counted"] == [1.0] * 4 and seen["shared"][0] == seen["ids"][0]


def test_one_process_writes_what_a_run_has_one_of(two_by_two):
    workdir, _ = two_by_two
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["processes"] == 2 and environment["devices"].startswith("4 x ")
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    silent = (workdir.parent / "rank-1.log").read_text()
    assert "step " not in silent and "parameters" not in silent


def test_what_two_processes_saved_one_goes_on_from(two_by_two, tmp_path):
    workdir, seen = two_by_two
    shutil.copytree(workdir / "checkpoints" / "10", tmp_path / "checkpoints" / "10")
    result = train.run(config(data=2, fsdp=2), str(tmp_path))
    assert result.step == STEPS
    rows = metrics.read(str(tmp_path))
    assert rows[0]["step"] == 11
    np.testing.assert_allclose([row["loss"] for row in rows], seen["loss"][10:], rtol=1e-5)


def rank_pid(launcher, rank):
    """The process that launch/local.py started as `rank`."""
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        if f"VIDGEN_PROCESS={rank}\0" in pathlib.Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"no rank {rank} among {children}")


def test_sigterm_to_one_ends_all_after_the_same_step_and_saves(tmp_path):
    c = config()
    c.train.update(steps=100_000, checkpoint_every=100_000, eval_every=2, eval_rows=4, sample_every=2)
    c.sample.prompts = ("a red circle",)
    workdir = tmp_path / "w"
    process = local(2, 1, "--", "train", "--config", config_file(tmp_path, c), "--workdir", workdir, "--json")
    try:
        deadline = time.time() + 150
        while time.time() < deadline and len(metrics.read(str(workdir))) < 3 and process.poll() is None:
            time.sleep(0.1)
        os.kill(rank_pid(process, 1), signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    last = json.loads(out.splitlines()[-1])
    other = (workdir / "logs/rank-1.log").read_text()
    assert last["stopped_by"] == "SIGTERM" and f"Stopped by SIGTERM after step {last['step']}" in err
    assert json.loads(other.splitlines()[-1])["step"] == last["step"]
    assert "SIGTERM: stopping after a step and saving" in other and "stopping after a step" not in err
    checkpoints = Checkpoints(str(workdir), read_only=True)
    assert checkpoints.latest == last["step"] == metrics.read(str(workdir))[-1]["step"]
    checkpoints.close()
    rows = [row for row in metrics.read(str(workdir)) if "heldout_loss" in row]
    assert rows and all(np.isfinite(row["heldout_loss"]) for row in rows)
    assert os.path.getsize(workdir / "samples" / "00000002" / "grid.mp4") > 0


def test_an_error_on_one_process_ends_all_with_a_line_that_names_it(tmp_path):
    script = tmp_path / "other_seed.py"
    script.write_text(
        "import os, sys\nfrom vidgen.cli import main\n"
        "main(sys.argv[1:] + ['--config.seed=5'] * (os.environ['VIDGEN_PROCESS'] == '1'))\n"
    )
    command = ["train", "--config", config_file(tmp_path, config()), "--workdir", tmp_path / "w"]
    process = local(2, 1, "--", script, *command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert "local.py: process 1 of 2 failed with exit status 2; the others were ended" in err
    assert "vidgen train: process 1 of 2: error: process 0 was started with another config: it differs in seed" in err
    assert "Traceback" not in out + err


def test_a_workdir_that_is_not_shared_is_told(tmp_path):
    with pytest.raises(ConfigError, match="it can't be seen from here; expected a workdir on a file system that all"):
        check_config(str(tmp_path), config())
    write_config(str(tmp_path), config())
    check_config(str(tmp_path), config())


TOLD = {"VIDGEN_COORDINATOR": "10.0.0.1:1234", "VIDGEN_PROCESSES": "4", "VIDGEN_PROCESS": "2"}


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, None),
        (TOLD, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 2}),
        (TOLD | {"VIDGEN_DISTRIBUTED": "off"}, None),
        (TOLD | {"VIDGEN_PROCESSES": "1", "VIDGEN_PROCESS": "0"}, None),
        ({"VIDGEN_DISTRIBUTED": "auto"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine hostnames, please set them"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "VIDGEN_DISTRIBUTED": "off"}, None),
    ],
)
def test_the_environment_says_who_is_who(env, told):
    assert processes._told(env) == told


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"VIDGEN_PROCESS": "0"}, "VIDGEN_PROCESS is set but not VIDGEN_COORDINATOR and VIDGEN_PROCESSES"),
        (TOLD | {"VIDGEN_PROCESS": "4"}, "VIDGEN_PROCESS=4: expected 0 to 3, since VIDGEN_PROCESSES=4"),
        (TOLD | {"VIDGEN_PROCESSES": "four"}, "VIDGEN_PROCESSES=four: expected a whole number"),
        (TOLD | {"VIDGEN_COORDINATOR": "10.0.0.1"}, "VIDGEN_COORDINATOR=10.0.0.1: expected HOST:PORT"),
        ({"VIDGEN_DISTRIBUTED": "yes"}, "VIDGEN_DISTRIBUTED=yes: expected auto or off"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told(env, says):
    with pytest.raises(ConfigError, match=says):
        processes._told(env)


def test_one_process_agrees_with_itself_at_once():
    processes.start()
    assert processes.is_lead() and processes.alone() and processes.agree({"a": 1}) == {"a": 1}
    processes.barrier("nothing")
    pulse = processes.Pulse(2)
    assert pulse(1, 2).tolist() == [[1.0, 2.0]]


MEETING = """
import os, sys, time
import numpy as np
from vidgen.config import ConfigError
from vidgen.parallel import processes
processes.start()
processes.start()
rank = int(os.environ["VIDGEN_PROCESS"])
assert processes.is_lead() == (rank == 0) and processes.rank() == f"process {rank} of 2"
assert processes.agree([rank, "ü"]) == [0, "ü"] and processes.agree(rank) == 0
pulse = processes.Pulse(1)
assert [pulse(10 * rank + n).ravel().tolist() for n in range(3)] == [[0, 0], [0, 10], [1, 11]]
processes.barrier("to be here")
if rank == 1:
    time.sleep(1.5)
try:
    processes.barrier("to have done what takes long", 0.5)
except ConfigError as e:
    print("told:", e)
    print("leaves with", processes.exit_status(e))
"""


def test_two_processes_agree_and_wait_for_each_other_only_so_long(tmp_path):
    (tmp_path / "meeting.py").write_text(MEETING)
    process = local(2, 1, f"--logs={tmp_path}", "--", tmp_path / "meeting.py")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    told = next(line for line in out.splitlines() if line.startswith("told: "))
    assert told.startswith("told: waited up to 0.5 s for all 2 processes to have done what takes long, in vain: ")
    assert re.search(r": process 1 \(pid \d+ on \S+\) did not come$", told)
    assert "leaves with 75" in out


STOPPED_COORDINATOR = """
import os, signal, time
from vidgen.config import ConfigError
from vidgen.parallel import processes
processes.ASKING = 0.5
processes.start()
processes.barrier("to be here")
time.sleep(1)  # until both have heard that both are here
if processes.is_lead():
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.5)
try:
    processes.barrier("to have done it", 0.5)
except ConfigError as e:
    print("told:", e, flush=True)
os._exit(5)
"""


def test_a_coordinator_that_is_stopped_is_not_waited_for_longer(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED_COORDINATOR)
    process = local(2, 1, f"--logs={tmp_path}", "--", tmp_path / "stopped.py")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "told: waited up to 0.5 s for all 2 processes to have done it, in vain: process 0, the coord" in err


NOTICE = """
import os, signal, sys, time
import jax
from vidgen.parallel import processes
from vidgen.training.resilience import Breaks, Interrupted, StopSignal
rank = int(os.environ["VIDGEN_PROCESS"])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(os.environ["VIDGEN_COORDINATOR"], 2, rank)  # by a program that calls vidgen
processes.start()
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)  # before a StopSignal is there
with StopSignal() as stop:
    pulse = processes.Pulse(1)
    for n in range(1, 1000):
        time.sleep(0.01 + 0.01 * rank)
        pulse(0)
        if processes.preempted(n):
            print("preempted at", n, stop.name, flush=True)
            break
    breaks = Breaks(stop)
    try:
        for n in range(20):
            if n == 3 and rank == 1:
                stop.name = "SIGUSR1"
            breaks()
    except Interrupted as e:
        print("left at", n, e.number, flush=True)
"""


def test_a_notice_to_one_process_reaches_all_at_the_same_step_and_batch(tmp_path):
    (tmp_path / "notice.py").write_text(NOTICE)
    process = local(2, 1, f"--logs={tmp_path}", "--", tmp_path / "notice.py")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    both = [re.findall("(?:preempted|left) at .*", (tmp_path / f"rank-{n}.log").read_text()) for n in range(2)]
    assert both[0] == both[1] and both[0][0].startswith("preempted at ") and both[0][1] == "left at 4 10"


def raised_from(cause):
    """As `Checkpoints` raises it."""
    error = ConfigError("the checkpoint could not be written")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a flag"), 2),
        (FileNotFoundError(2, "No such file"), 2),
        (processes.Restartable("not here"), 75),
        (ConnectionResetError("gone"), 75),
        (OSError(errno.EIO, "Input/output error"), 75),
        (raised_from(OSError(errno.ESTALE, "Stale file handle")), 75),
        (raised_from(jax.errors.JaxRuntimeError("a task has died")), 75),
        (raised_from(ValueError("UNAVAILABLE: Error writing gs://runs/a: HTTP 503")), 75),
        (raised_from(RuntimeError("INTERNAL: pread: Stale file handle")), 75),
        (raised_from(OSError(errno.ENOTCONN, "Transport endpoint is not connected")), 75),
        (raised_from(OSError(errno.EMFILE, "Too many open files")), 75),
        (raised_from(ValueError("PERMISSION_DENIED: refused")), 2),
        (ConfigError("clips are UNAVAILABLE"), 2),
        (raised_from(OSError(errno.ENOSPC, "No space left on device")), 2),
        (raised_from(raised_from(OSError(errno.ESTALE, "Stale file handle"))), 75),  # a clip of a set out of sight
        (raised_from(processes.Restartable("not here")), 75),
        (raised_from(RuntimeError("open() failed: No such file or directory; opening /a/clips")), 75),
        (raised_from(ValueError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]")), 2),
        (SystemExit(75), 75),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_the_exit_status_says_whether_a_restart_may_mend_it(error, status):
    assert processes.exit_status(error) == status


def test_who_waits_in_vain_for_the_coordinator_says_so(tmp_path):
    script = "from vidgen.parallel import processes\nprocesses.START_TIMEOUT = 1\nprocesses.start()\n"
    env = os.environ | {"VIDGEN_COORDINATOR": "127.0.0.1:9", "VIDGEN_PROCESSES": "2", "VIDGEN_PROCESS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == (
        "vidgen: error: process 1 of 2 waited 1 s for the others to meet at 127.0.0.1:9; "
        "do all run, and can they reach it?"
    )
