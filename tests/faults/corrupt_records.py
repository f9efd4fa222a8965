"""A set of clips of which a tenth can't be read: the run goes on, and says which they are."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

from table import Result, Row, Trial, Verdict, all_wrong
from tiny_runs import HERE, make_config, trained

from vidgen import config as configs
from vidgen.data import quarantine
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.tokenizers import base as tokenizers


def trials(short: bool, seed: int) -> list[Trial]:
    """1,000 among 10,000; short: 20 among 200. The run is ended in the middle and goes on."""
    return [{"records": 200 if short else 10_000, "corrupt": 20 if short else 1000, "seed": seed}]


def config(folder: pathlib.Path, records: int) -> Any:
    """Large batches of small clips: few steps see all of them."""
    c = make_config(**{"data.source": str(folder), "train.max_bad": 0.5, "train.checkpoint_every": 1000})
    c.rows.update(count=4 if records < 1000 else 32, tokens=96, segments=16, text=512, caption=48, window=1024)
    return c


def steps_to_see_all(c: Any, records: int) -> int:
    """Within which each clip is shown at least once: of so few, many passes are packed together."""
    source = open_source(c.data, "train")
    packing = Packing(source.sizes, tokenizers.from_config(c.tokenizer).geometry, c.rows, c.seed)
    left, step = set(range(records)), 0
    while left:
        left -= {place.clip for row in packing.step(step) for place in row}
        step += 1
    return step


def make_set(folder: pathlib.Path, trial: Trial) -> dict[int, str]:
    """Writes the clips; {index of a corrupt one: the reason that a run is to give}."""
    spec = importlib.util.spec_from_file_location("corrupt", HERE.parent / "data" / "corrupt.py")
    corrupt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corrupt)
    return corrupt.make_corrupt_set(folder, **trial)


def attempt(shared: pathlib.Path, own: pathlib.Path, trial: Trial) -> Result:
    """Two attempts that see each clip at least once."""
    expected = make_set(own / "clips", trial)
    c, workdir = config(own / "clips", trial["records"]), own / "run"
    steps = steps_to_see_all(c, trial["records"])
    for last in (steps // 2, steps):
        result = trained(configs.override(c, {"train.steps": last}), workdir)
    lines, wrong = quarantine.read(str(workdir)), []
    text = (workdir / quarantine.FILE).read_text(encoding="utf-8") if lines else ""
    listed = {line["index"]: line["reason"] for line in lines}
    if result.step != steps:
        wrong.append(f"the run ended at step {result.step} of {steps}")
    if missed := expected.keys() - listed.keys():
        wrong.append(f"{len(missed)} corrupt clips are not listed, {min(missed)} first: {expected[min(missed)]}")
    if more := listed.keys() - expected.keys():
        wrong.append(f"{len(more)} sound clips are listed, {min(more)} first: {listed[min(more)]}")
    if other := [i for i in expected.keys() & listed.keys() if listed[i] != expected[i]]:
        wrong.append(f"{len(other)} have another reason: {min(other)} {listed[min(other)]!r}")
    if len(text.splitlines()) != len(listed):
        wrong.append(f"{len(text.splitlines())} lines for {len(listed)} clips")
    return {"wrong": wrong, "corrupt": len(expected), "listed": len(listed), "steps": steps} | {"of": trial["records"]}


def judge(results: list[Result]) -> Verdict:
    (r,) = results
    held = f"the run took all of its {r['steps']} steps; {r['listed']} of {r['of']} clips are listed, each once"
    return Verdict(r["corrupt"], held, all_wrong(results))


ROW = Row(
    "corrupt-records",
    "Corrupt records among the clips",
    lambda: "",
    trials,
    attempt,
    judge,
)
