"""Runs of every kind of training that go on from each of their checkpoints, on the mesh they had."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import ended_alike, make_config, make_vae_config, trained

from vidgen import config as configs

STEPS = 6


def plain(shared: pathlib.Path) -> Any:
    """Packed rows, the moving average, on four devices."""
    return make_config(**{"train.steps": STEPS, "optimizer.schedule": "cosine"})


def accumulating(shared: pathlib.Path) -> Any:
    """Two microbatches a step, on two devices' worth of rows."""
    c = plain(shared)
    c.rows.count, c.optimizer.accumulate = 8, 2
    return c


def muon(shared: pathlib.Path) -> Any:
    """The default optimizer, a learned text encoder, and clips whose first frame is given."""
    c = plain(shared)
    c.text.layers, c.optimizer.name, c.control.masks = 1, "muon", (("first", 0.5),)
    return c


def galore(shared: pathlib.Path) -> Any:
    """Moments in a space that is drawn anew every other step."""
    c = plain(shared)
    c.optimizer.update(name="galore", galore_every=2)
    return c


def lora(shared: pathlib.Path) -> Any:
    """Low-rank updates beside frozen weights: those of the plain run."""
    c = plain(shared)
    c.model.weights = str(straight(shared, "plain"))
    c.lora.update(rank=4, alpha=8.0)
    return c


def vae(shared: pathlib.Path) -> Any:
    """A VAE, images first, whose critics join after three steps."""
    return make_vae_config(**{"train.steps": STEPS})


KINDS: dict[str, Callable[[pathlib.Path], Any]] = {
    "plain": plain,
    "accumulating": accumulating,
    "muon": muon,
    "galore": galore,
    "lora": lora,
    "vae": vae,
}


def trials(short: bool, seed: int) -> list[Trial]:
    """Each kind from each of its checkpoints; short: low-rank updates and the weights they start from, from one."""
    if short:
        return [{"kind": "lora", "step": 3}]
    return [{"kind": kind, "step": step} for kind in KINDS for step in range(1, STEPS)]


def every_step(c: Any) -> Any:
    """The same, saved after every step, and all of it kept."""
    return configs.override(c, {"train.checkpoint_every": 1, "train.keep": STEPS + 1})


def straight(shared: pathlib.Path, kind: str) -> pathlib.Path:
    """The workdir of a run in one go with a checkpoint of every step, made once."""
    workdir = shared / f"straight-{kind}"
    if not (workdir / "done").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        trained(every_step(KINDS[kind](shared)), workdir)
        (workdir / "done").touch()
    return workdir


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """The rest of a run from one of its checkpoints, in a workdir of its own."""
    kind, step = trial["kind"], str(trial["step"])
    undisturbed = straight(shared, kind)
    shutil.copytree(undisturbed / "checkpoints" / step, own / "run/checkpoints" / step)
    c = every_step(KINDS[kind](shared))
    result = trained(c, own / "run")
    wrong = [f"ended at step {result.step}"] if result.step != STEPS else []
    wrong += ended_alike(c, undisturbed, own / "run", STEPS) if not wrong else []
    return {"wrong": [f"{kind} from step {step}: {text}" for text in wrong], "kind": kind}


def judge(results: list[Result]) -> Verdict:
    """Every one of them ends with the bits of the run in one go."""
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    alike = int(np.sum([not result["wrong"] for result in results]))
    return Verdict(len(results), f"{alike} ended bit-equal: {', '.join(kinds)}", all_wrong(results))


ROW = Row(
    "same-mesh",
    "Going on from any checkpoint on the same mesh: packing, accumulation, averages, VAE with critics, LoRA",
    lambda: "",
    trials,
    attempt,
    judge,
)
