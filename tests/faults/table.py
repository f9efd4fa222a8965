"""What a row of the fault table is, and how it is run: trial after trial, each kept when it is done."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

Trial = dict[str, Any]  # what to do, as JSON
Result = dict[str, Any]  # what came of it; "wrong" lists, in words, what did not hold


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the trials of a row say together.

    Attributes:
      count: faults there were, or resumes, or steps.
      held: what held, in words.
      wrong: what did not, a line each; empty where the bar is met.
      lost: median seconds of steps that had to be taken again; None where there is no such thing.
      recovery: slowest seconds from the fault to the first new step; None likewise.
    """

    count: int
    held: str
    wrong: tuple[str, ...] = ()
    lost: float | None = None
    recovery: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
      name: of the row, for --only.
      fault: in words.
      missing: () → what this machine or this version lacks for it; empty where nothing is.
      trials: (short form?, seed) → what to try, in order.
      attempt: (folder of the row, which trials share; an empty folder of its own; trial) → what came of it.
      judge: the results → the verdict.
    """

    name: str
    fault: str
    missing: Callable[[], str]
    trials: Callable[[bool, int], list[Trial]]
    attempt: Callable[[pathlib.Path, pathlib.Path, Trial], Result]
    judge: Callable[[list[Result]], Verdict]


def run(row: Row, folder: pathlib.Path, short: bool, seed: int, say: Callable[[str], None]) -> Verdict:
    """Tries what has not been tried in this folder; `say` gets a line a trial.

    FOLDER/results.jsonl keeps each finished trial; the folder of one in which something was wrong stays, to look at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    trials, results, began, fresh = row.trials(short, seed), [], time.monotonic(), 0
    for number, trial in enumerate(trials, 1):
        trial = json.loads(json.dumps(trial))
        found = [entry["result"] for entry in kept if entry["trial"] == trial]
        if found:
            results.append(found[0])
            continue
        own = folder / f"{number:03d}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        result = row.attempt(folder, own, trial)
        with file.open("a") as f:
            f.write(json.dumps({"trial": trial, "result": result}) + "\n")
        results.append(result)
        if not result.get("wrong"):
            shutil.rmtree(own)
        fresh += 1
        left = (time.monotonic() - began) / fresh * (len(trials) - number)
        told = "; ".join(result.get("wrong", ())) or "held"
        say(f"{row.name} {number}/{len(trials)}: {told} | eta {left / 60:.1f} min")
    return row.judge(results)


def markdown(lines: list[tuple[Row, Verdict | str]]) -> str:
    """The table; a row that could not be run has its reason instead of a verdict."""
    text = [
        "| fault | how many | what held | median lost work | slowest recovery | bar |",
        "|---|---|---|---|---|---|",
    ]
    for row, verdict in lines:
        if isinstance(verdict, str):
            text.append(f"| {row.fault} | 0 | not run: {verdict} | | | missed |")
            continue
        lost, recovery = ("" if x is None else f"{x:.1f} s" for x in (verdict.lost, verdict.recovery))
        met = "met" if not verdict.wrong else "missed: " + "; ".join(verdict.wrong[:5])
        text.append(f"| {row.fault} | {verdict.count} | {verdict.held} | {lost} | {recovery} | {met} |")
    return "\n".join(text)


def all_wrong(results: list[Result]) -> tuple[str, ...]:
    """What did not hold in any of the trials."""
    return tuple(text for result in results for text in result.get("wrong", ()))
