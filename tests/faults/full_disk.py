"""Runs whose disk is full from some moment on, for a while or for good."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import arrays, config_file, differing, ended_alike, last_step, make_config, saved_steps, started, wait

from vidgen.config import ConfigError
from vidgen.training.checkpoint import Checkpoints

SIZE = 64  # MiB of the disk: all that such a run keeps has room
SAVED = 20  # steps between checkpoints
PATIENCE = 300.0  # seconds
RESTARTS = 3


def trials(short: bool, seed: int) -> list[Trial]:
    """20 moments; every other time there is room again after some seconds. Short: one, of a short run."""
    rng, count, steps = random.Random(f"full disk {seed}"), 1 if short else 20, 100 if short else 400
    draws = [{"steps": steps, "step": rng.randrange(1, steps * 3 // 4), "more": rng.random()} for _ in range(count)]
    return [draw | {"emptied": i % 2 == 1, "seconds": rng.uniform(0.5, 4)} for i, draw in enumerate(draws)]


def config(steps: int) -> Any:
    return make_config(**{"train.steps": steps, "train.checkpoint_every": SAVED, "train.keep": 3, "mesh.data": 1})


@contextlib.contextmanager
def disk(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A disk of so many MiB, in memory, mounted at FOLDER/disk."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: pathlib.Path) -> pathlib.Path:
    """Writes a file until nothing more fits."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as f:
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while f.write(b"\0" * size) == size:
                    pass
    return ballast


def command(own: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    return [sys.executable, "-m", "vidgen.cli", "train", f"--config={own / 'c.py'}", f"--workdir={workdir}"]


def straight(shared: pathlib.Path, steps: int) -> pathlib.Path:
    """The workdir of a run that nothing happens to, made once."""
    own = shared / "straight"
    if not (own / "done").exists():
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        config_file(own, config(steps))
        with started(command(own, own / "run"), own / "log", JAX_NUM_CPU_DEVICES="1") as process:
            if process.wait(timeout=900):
                raise RuntimeError(f"the run that nothing happens to failed: {(own / 'log').read_text()[-2000:]}")
        (own / "done").touch()
    return own / "run"


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """A run on a small disk that is filled at a step, started again with room until it has ended."""
    steps, log, wrong = trial["steps"], own / "log", []
    undisturbed, c = straight(shared, steps), config(steps)
    config_file(own, c)
    with disk(own, SIZE) as place:
        workdir = place / "run"
        with started(command(own, workdir), log, JAX_NUM_CPU_DEVICES="1") as process:
            wait("its moment", lambda: process.poll() is not None or last_step(workdir) >= trial["step"], PATIENCE)
            time.sleep(0.3 * trial["more"])  # so that it falls into all parts of a step and of a save
            before = saved_steps(workdir)
            ballast, at = fill(place), last_step(workdir)
            until = time.monotonic() + trial["seconds"]
            if trial["emptied"]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0))
                ballast.unlink()
            status = process.wait(PATIENCE)
        first = log.read_text(errors="replace")
        # What was committed before is still there and reads as it did, but for what newer ones have replaced.
        good, kept = newest_good(c, workdir), [step for step in saved_steps(workdir) if step in before]
        if before and good < before[-1]:
            wrong.append(f"filled at step {at}: {before[-1]} was saved, and the newest good one is {good}")
        if kept and (names := unlike(c, undisturbed, workdir, kept[-1])):
            wrong.append(f"filled at step {at}: {kept[-1]} does not read as it was saved: {names[0]}")
        said = os.strerror(errno.ENOSPC) in first
        if not said:
            wrong.append(f"filled at step {at}: ended with {status} and without a word of the disk: {first[-300:]}")
        # Threads of tensorstore print some of an event loop that Orbax has closed, which pass through no code of ours.
        if any(line.lstrip().startswith('File "') and "/vidgen/" in line for line in first.splitlines()):
            wrong.append(f"filled at step {at}: a traceback")
        ballast.unlink(missing_ok=True)
        restarts = 0
        while status and restarts < RESTARTS:
            restarts += 1
            with started(command(own, workdir), log, JAX_NUM_CPU_DEVICES="1") as process:
                status = process.wait(PATIENCE)
        wrong += [f"filled at step {at}: {text}" for text in ended_alike(c, undisturbed, workdir, steps)]
    return {"wrong": wrong, "at": at, "survived": not restarts, "said": said, "emptied": trial["emptied"]}


def newest_good(c: Any, workdir: pathlib.Path) -> int:
    """The newest checkpoint that agrees with its checksums; 0 where there is none."""
    checkpoints = Checkpoints(str(workdir), c.train, read_only=True)
    try:
        return checkpoints.newest_good(lambda line: None) or 0
    except ConfigError:  # there are some, and none is good
        return 0
    finally:
        checkpoints.close()


def unlike(c: Any, undisturbed: pathlib.Path, workdir: pathlib.Path, step: int) -> list[str]:
    """In what a checkpoint differs from the other run's of the same step, or why it can't be read."""
    try:
        found = arrays(c, workdir, step)
    except ValueError as e:
        return [str(e)]
    return differing(arrays(c, undisturbed, step), found) if step in saved_steps(undisturbed) else []


def judge(results: list[Result]) -> Verdict:
    """Nothing saved before is lost, a word is said, and with room again the run ends as if nothing had been."""
    alike = sum(not result["wrong"] for result in results)
    through, said = (sum(result[name] for result in results) for name in ("survived", "said"))
    held = f"{alike} of {len(results)} lost nothing and ended bit-equal; {through} without a restart, {said} said so"
    return Verdict(len(results), held, all_wrong(results))


def missing() -> str:
    if os.geteuid() != 0 or shutil.which("mount") is None or not sys.platform.startswith("linux"):
        return "only root can mount a small disk, on Linux"
    return ""


ROW = Row("full-disk", "The disk full at a random moment of a run", missing, trials, attempt, judge)
