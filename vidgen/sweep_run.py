"""One run of a sweep, in a process of its own: trains, judges, and writes result.json. Launchers start it:

python -m vidgen.sweep_run DIR NAME
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from vidgen import evaluate, secrets, train
from vidgen.config import ConfigError
from vidgen.scaling import budgets, manifest
from vidgen.scaling.manifest import Manifest, Run
from vidgen.studio import media
from vidgen.training import metrics
from vidgen.training.resilience import only_one


def main(argv: list[str]) -> int:
    """Runs NAME of the sweep in DIR to its end, or until a signal asks to save.

    The exit status: 0 done, 1 failed, 128 + the signal, as `vidgen train` has it: it goes on when started again.
    """
    if len(argv) != 2:
        raise ConfigError(f"expected DIR NAME, got {len(argv)} arguments")
    folder, name = argv
    sweep = manifest.read(folder)
    run = next((run for run in sweep.runs if run.name == name), None)
    if run is None:
        raise ConfigError(f"{folder}: no run {name!r} in the sweep")
    own = os.path.join(manifest.workdir(folder, name), "job")
    with only_one(own):  # of two that are started by mistake, one works
        if (found := manifest.result(folder, name)) and found["status"] == "done":
            return 0
        try:
            found = measured(sweep, run, manifest.workdir(folder, name))
        except Exception as e:  # whatever ends a run is its result
            print(secrets.redacted(traceback.format_exc()), file=sys.stderr)
            found = {"status": "failed", "error": one_line(e)}
        if found["status"] == "stopped":
            return 128 + signal.Signals[found["by"]]
        path = os.path.join(manifest.workdir(folder, name), manifest.RESULT)
        media.write(path, json.dumps(found, indent=1).encode())
        return 0 if found["status"] == "done" else 1


def measured(sweep: Manifest, run: Run, workdir: str) -> dict[str, Any]:
    """Trains and judges; the figures, or "stopped" "by" a signal that came first.

    A run whose loss is not finite has failed; what it is worth otherwise is its held-out loss at the last step,
    the mean over the noise levels; `loss/level_0` and so on are the loss at each. One that can't be judged has failed
    too, and keeps its loss.
    """
    config = manifest.config_of(sweep, run)
    size = budgets.size_of(config)
    config.train.eval_every = config.train.steps  # the loss that the sweep is about
    ended = train.run(config, workdir)
    if ended.stopped_by:
        return {"status": "stopped", "by": ended.stopped_by}
    rows = metrics.read(workdir)
    figures = {
        "parameters": size.parameters,
        "tokens": rows[-1]["tokens_seen"],
        "flops": size.flops * config.train.steps,
        "loss": rows[-1].get("heldout_loss"),
        "steps": config.train.steps,
        "seconds": seconds(rows),
        "skipped_steps": rows[-1].get("skipped_steps"),
        "unreadable_clips": rows[-1].get("unreadable_clips"),
    } | {f"loss/{key.partition('/')[2]}": value for key, value in rows[-1].items() if key.startswith("heldout_loss/")}
    if not manifest.finite(figures["loss"]):
        return {
            "status": "failed",
            "error": f"held-out loss is {figures['loss']} after step {rows[-1]['step']}",
        } | figures
    for suite in sweep.suites:
        takes = "prompts" in evaluate.SUITES[suite].flags
        try:
            found = evaluate.run(workdir, suite, **({"prompts": sweep.prompts} if takes else {}))
        except Exception as e:  # the loss stands all the same, and another try needs only to judge
            print(secrets.redacted(traceback.format_exc()), file=sys.stderr)
            return {"status": "failed", "error": f"--suite {suite}: {one_line(e)}"} | figures
        figures |= {f"{suite}.{key}": value for key, value in numbers(found).items()}
    return {"status": "done", "error": ""} | figures


def one_line(e: Exception) -> str:
    """What a table says of an error."""
    return secrets.redacted(" ".join(f"{type(e).__name__}: {e}".split()))[:500]


def seconds(rows: list[Mapping[str, Any]]) -> float | None:
    """Of all steps, by the mean of each logged stretch; None where none was timed: the first step only compiles."""
    ends = [0, *(row["step"] for row in rows)]
    stretches = [
        (row.get("seconds_per_step"), b - a) for row, (a, b) in zip(rows, itertools.pairwise(ends), strict=True)
    ]
    timed = [(each, count) for each, count in stretches if each]
    if not timed:
        return None
    return sum(each * count for each, count in timed) * ends[-1] / sum(count for _, count in timed)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures among what a suite returned."""
    return {k: v for k, v in found.items() if not isinstance(v, bool) and isinstance(v, int | float) and k != "step"}


if __name__ == "__main__":
    secrets.guard()
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"vidgen.sweep_run: error: {error}")
