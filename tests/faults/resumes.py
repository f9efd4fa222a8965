"""Runs that are saved under one layout of processes and devices and go on under another."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
from typing import Any

import numpy as np
from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import HERE, differing, local, make_config, started
from tiny_runs import arrays as arrays_of

from vidgen import config as configs
from vidgen.training import metrics

SAVED, STEPS = 20, 40  # goes on after the first, up to the second
TOLERANCE = 1e-5  # relative, of the f32 losses on another layout
# Name: (processes, devices of each, mesh).
LAYOUTS = {
    "1x4 data+tensor": (1, 4, {"data": 2, "tensor": 2}),
    "2x2 fsdp": (2, 2, {"data": 1, "fsdp": 4}),
    "4x1 fsdp+context": (4, 1, {"data": 1, "fsdp": 2, "context": 2, "attention": "ulysses+gather", "ulysses": 2}),
    "1x1": (1, 1, {"data": 1}),
}


def config(layout: str, steps: int) -> Any:
    c = make_config(**{"train.steps": steps, "train.checkpoint_every": SAVED, "train.keep": 10})
    c.mesh.update(LAYOUTS[layout][2])
    return c


def trials(short: bool, seed: int) -> list[Trial]:
    """All ordered pairs of layouts, and each with itself; short: one pair."""
    pairs = [("2x2 fsdp", "1x4 data+tensor")] if short else list(itertools.product(LAYOUTS, LAYOUTS))
    return [{"saved": a, "resumed": b} for a, b in pairs]


def trained(layout: str, own: pathlib.Path, steps: int) -> dict[str, Any]:
    """A run under the layout in OWN/run, from what is there: its clips, noise and losses, by step as a string."""
    processes, devices, _ = LAYOUTS[layout]
    file = own / "c.json"
    file.write_text(configs.to_json(config(layout, steps)))
    command = [f"--logs={own}/logs", "--", HERE / "seen.py", file, own / "run", own / "seen"]
    with started(local(processes, devices, *command), own / "log") as process:
        if process.wait(timeout=900):
            raise RuntimeError(f"{layout} failed: {(own / 'log').read_text(errors='replace')[-2000:]}")
    told = [json.loads(path.read_text()) for path in sorted(own.glob("seen-*.json"))]
    ids: dict[str, dict[str, list[int]]] = {}
    for process_told in told:
        for step, rows in process_told["ids"].items():
            ids.setdefault(step, {}).update(rows)
    losses = {str(row["step"]): row["loss"] for row in metrics.read(str(own / "run"))}
    return {"ids": ids, "noise": told[0]["noise"], "loss": losses}


def undisturbed(shared: pathlib.Path, layout: str) -> tuple[pathlib.Path, dict[str, Any]]:
    """(workdir, what was seen) of a run under one layout from its start to its end, made once."""
    own = shared / f"straight {layout}".replace(" ", "-")
    if not (own / "told.json").exists():
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        told = trained(layout, own, STEPS)
        (own / "told.json").write_text(json.dumps(told))
    return own / "run", json.loads((own / "told.json").read_text())


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """The checkpoint of one layout goes on under another, and is compared with the first layout's own end."""
    saved, resumed = trial["saved"], trial["resumed"]
    workdir, expected = undisturbed(shared, saved)
    shutil.copytree(workdir / "checkpoints" / str(SAVED), own / "run/checkpoints" / str(SAVED))
    told, wrong, what = trained(resumed, own, STEPS), [], f"{saved} → {resumed}"
    steps = [str(n) for n in range(SAVED + 1, STEPS + 1)]
    if sorted(told["loss"], key=int) != steps:
        return {"wrong": [f"{what}: took steps {sorted(told['loss'], key=int)}"], "error": 1.0}
    for kind in ("ids", "noise"):
        if any(told[kind].get(n) != expected[kind][n] for n in steps):
            wrong.append(f"{what}: other {kind}")
    got, want = (np.asarray([t["loss"][n] for n in steps]) for t in (told, expected))
    error = float(np.max(np.abs(got - want) / np.abs(want)))
    if not error <= TOLERANCE:
        wrong.append(f"{what}: losses are off by {error:.1e}")
    if saved == resumed:
        c = config(saved, STEPS)
        names = differing(arrays_of(c, workdir, STEPS), arrays_of(c, own / "run", STEPS))
        wrong += [f"{what}: {len(names)} arrays differ, {names[0]} first"] if names else []
    return {"wrong": wrong, "error": error, "same": saved == resumed}


def judge(results: list[Result]) -> Verdict:
    """Clips and noise bit-equal, losses within the tolerance; on the same layout every bit of the state."""
    same = [result for result in results if result["same"]]
    worst = max(result["error"] for result in results)
    alike = sum(not result["wrong"] for result in same)
    held = f"clips and noise bit-equal, losses within {worst:.1e} over {STEPS - SAVED} steps"
    held += f"; {alike} of {len(same)} on the same layout bit-equal" if same else ""
    return Verdict(len(results), held, all_wrong(results))


ROW = Row(
    "resumes",
    "Going on under another layout: 1, 2 and 4 processes; data, fsdp, context, tensor",
    lambda: "",
    trials,
    attempt,
    judge,
)
