"""One bit of a checkpoint turned over, anywhere: it is found, named, and the checkpoint before is used."""

from __future__ import annotations

import pathlib
import random
import shutil
from typing import Any

from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import ended_alike, make_config, saved_steps, trained

from vidgen.training.checkpoint import Checkpoints

STEPS = 6  # with a checkpoint after the third and the last


def trials(short: bool, seed: int) -> list[Trial]:
    """50 places, half of them drawn by byte and half by file, in which the small ones count as much; short: 6.

    One in ten is also trained on from.
    """
    rng, count = random.Random(f"bit flips {seed}"), 6 if short else 50
    draws = [{"by": ("byte", "file")[i % 2], "at": rng.random(), "byte": rng.random()} for i in range(count)]
    return [draw | {"bit": rng.randrange(8), "train": i % 10 == 0} for i, draw in enumerate(draws)]


def config(steps: int) -> Any:
    return make_config(**{"train.steps": steps, "train.checkpoint_every": 3})


def straight(shared: pathlib.Path, steps: int) -> pathlib.Path:
    """The workdir of a run that nothing happens to, made once."""
    workdir = shared / f"straight-{steps}"
    if not (workdir / "done").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        trained(config(steps), workdir)
        (workdir / "done").touch()
    return workdir


def flip(folder: pathlib.Path, trial: Trial) -> str:
    """Turns a bit over in one of the files; which file and byte."""
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {path: size for path, size in sizes.items() if size}
    if trial["by"] == "file":
        path = list(sizes)[int(trial["at"] * len(sizes))]
        place = int(trial["byte"] * sizes[path])
    else:
        place = int(trial["at"] * sum(sizes.values()))
        for path, size in sizes.items():  # noqa: B007, the one that it stops at
            if place < size:
                break
            place -= size
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << trial["bit"]
    path.write_bytes(data)
    return f"byte {place} of {path.relative_to(folder)}"


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """A bit of the newest checkpoint of two, in a copy of the run."""
    workdir, said, wrong = own / "run", [], []
    shutil.copytree(straight(shared, STEPS), workdir)
    older, newest = saved_steps(workdir)
    where = flip(workdir / "checkpoints" / str(newest), trial)
    checkpoints = Checkpoints(str(workdir), config(STEPS).train)
    try:
        found = checkpoints.newest_good(said.append)
    except Exception as e:  # a checkpoint that can't even be looked at must not end the search
        found = f"{type(e).__name__}: {e}"
    finally:
        checkpoints.close()
    if found != older:
        wrong.append(f"{where}: went on from {found}, expected {older}")
    if not any(str(newest) in line for line in said):
        wrong.append(f"{where}: nothing was said of it, but {said}")
    if trial["train"] and not wrong:
        expected, c = straight(shared, STEPS + 2), config(STEPS + 2)
        trained(c, workdir)
        wrong += [f"{where}, trained on: {text}" for text in ended_alike(c, expected, workdir, STEPS + 2)]
    return {"wrong": wrong, "where": where, "trained": trial["train"]}


def judge(results: list[Result]) -> Verdict:
    """Not one is missed."""
    detected = sum(not result["wrong"] for result in results)
    trained = sum(result["trained"] for result in results)
    files = len({result["where"].partition(" of ")[2] for result in results})
    held = f"{detected} of {len(results)} detected, in {files} files; {trained} trained on from the one before"
    return Verdict(len(results), held, all_wrong(results))


ROW = Row(
    "bit-flips",
    "A bit turned over in a checkpoint",
    lambda: "",
    trials,
    attempt,
    judge,
)
