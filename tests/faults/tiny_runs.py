"""Tiny runs for faults to happen to: how one is started, watched, and compared with one that nothing happened to."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))  # where the suite is run as a command, and not by pytest
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported, as in conftest.py

import jax  # noqa: E402
import numpy as np  # noqa: E402
from conftest import (  # noqa: E402, which gives this process four devices
    config_file,
    make_tiny,
    make_tiny_vae,
)
from conftest import processes as processes  # noqa: E402, for the rows beside this file
from conftest import ranks as ranks  # noqa: E402

from vidgen import config as configs  # noqa: E402
from vidgen import train  # noqa: E402
from vidgen.training import metrics  # noqa: E402
from vidgen.training.checkpoint import Checkpoints  # noqa: E402
from vidgen.training.program import build, task_of  # noqa: E402


def make_config(**changes: Any) -> Any:
    """One layer, which compiles in seconds; the learning rate knows nothing of the run's length, nor does the step."""
    c = make_tiny()
    c.model.update(layers=1, unroll=1)
    c.text.layers = 0
    c.optimizer.update(name="adamw", schedule="constant")
    return configs.override(c, {"train.log_every": 1, "train.checkpoint_every": 10} | changes)


def make_vae_config(**changes: Any) -> Any:
    """Of a VAE, images first, whose critics join after three steps."""
    return configs.override(make_tiny_vae(), {"train.log_every": 1} | changes)


def environment() -> dict[str, str]:
    """Of the processes that train: programs that have been compiled before are not again."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def local(processes: int, devices: int, *command: Any) -> list[str]:
    """The command that runs another on so many processes of this machine."""
    launcher = [sys.executable, str(ROOT / "launch/local.py"), f"--processes={processes}", f"--devices={devices}"]
    return [*launcher, *map(str, command)]


@contextlib.contextmanager
def started(command: list[str], log: pathlib.Path, **env: str) -> Iterator[subprocess.Popen]:
    """The command, started, its output in a file; killed at the end with all that names the same folder."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment() | env)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def straight(folder: pathlib.Path, c: Any, processes: int, devices: int, **env: str) -> pathlib.Path:
    """The workdir of a run of this config that nothing happens to, made once in FOLDER/straight."""
    own = folder / "straight"
    if not (own / "done").exists():
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        command = ["train", "--config", config_file(own, c), "--workdir", own / "run"]
        with started(local(processes, devices, "--", *command), own / "log", **env) as process:
            if process.wait(timeout=1800):
                raise RuntimeError(f"the run that nothing happens to failed: {(own / 'log').read_text()[-2000:]}")
        (own / "done").touch()
    return own / "run"


def trained(c: Any, workdir: pathlib.Path) -> train.Result:
    """`train.run` in this process, which says what it has to say in WORKDIR.log.

    Where it is asked to stop, it is the suite that was, and ends too.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{workdir}.log", "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        result = train.run(c, str(workdir))
    if result.stopped_by:
        sys.exit(f"stopped by {result.stopped_by}")
    return result


def arrays(c: Any, workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name: the state and its moving average, read onto this process's devices."""
    c = configs.override(c, {"mesh.data": -1} | {f"mesh.{axis}": 1 for axis in ("fsdp", "context", "tensor")})
    checkpoints = Checkpoints(str(workdir), read_only=True)
    try:
        state = checkpoints.restore(step, build(c, task_of(c).mesh(c)).state_like)
    finally:
        checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(jax.device_get(x)) for path, x in leaves}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """The names under which two checkpoints don't hold the same bits."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()
    )


def ended_alike(c: Any, undisturbed: pathlib.Path, workdir: pathlib.Path, step: int) -> list[str]:
    """What is wrong with how a run ended, against one that nothing happened to; empty where every bit is the same."""
    if step not in saved_steps(workdir):
        return [f"no checkpoint of step {step} at the end, but of {saved_steps(workdir)}"]
    names = differing(arrays(c, undisturbed, step), arrays(c, workdir, step))
    return [f"{len(names)} arrays differ, {names[0]} first"] if names else []


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The checkpoints that are committed, oldest first."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    return any("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def last_step(workdir: pathlib.Path) -> int:
    """The newest step of metrics.jsonl; 0 where there is none."""
    try:
        with (workdir / metrics.FILE).open("rb") as f:
            f.seek(max(f.seek(0, os.SEEK_END) - 4096, 0))
            lines = f.read().split(b"\n")[:-1]  # what follows the last end of a line is not whole
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def wait(what: str, ready: Callable[[], Any], timeout: float, every: float = 0.02) -> Any:
    """Until `ready()` gives something true, which is returned; raises TimeoutError that says what was waited for."""
    until = time.monotonic() + timeout
    while not (found := ready()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(every)
    return found
