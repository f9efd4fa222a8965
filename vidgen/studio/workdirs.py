"""What a run left in its workdir: samples and judgements, as far as they are there."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Mapping
from typing import Any

from vidgen.config import ConfigError

CLIP_BYTES = 6_000_000  # of a GIF; above it the MP4 is taken


@dataclasses.dataclass(frozen=True)
class Sample:
    """WORKDIR/samples/<step>: `video` is a file or "", `about` what prompts.json says."""

    step: int
    video: str
    about: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A file of WORKDIR/evaluation: a suite's results, at a step if it says so."""

    suite: str
    step: int | None
    results: Mapping[str, Any]


def check(workdir: str) -> None:
    """Raises ConfigError if this is not the workdir of a run."""
    if not os.path.isdir(workdir):
        raise ConfigError(f"workdir {workdir}: no such directory; expected the --workdir of a vidgen train")
    if not os.path.exists(os.path.join(workdir, "config.json")):
        runs = sorted(glob.glob(os.path.join(glob.escape(workdir), "*", "config.json")), key=os.path.getmtime)
        hint = f"; did you mean {os.path.dirname(runs[-1])}?" if runs else ""
        raise ConfigError(f"workdir {workdir}: no config.json in it, so it is not the workdir of a run{hint}")


def read_json(path: str) -> Any:
    """What a JSON file holds; None without the file, and the reason as {"unreadable": …} for a broken one."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        return {"unreadable": f"{os.path.basename(path)}: {e}"}


def samples(workdir: str) -> list[Sample]:
    """Oldest first."""
    found = []
    for folder in glob.glob(os.path.join(glob.escape(workdir), "samples", "*", "")):
        step = os.path.basename(os.path.dirname(folder))
        if step.isdigit():
            gif, mp4 = os.path.join(folder, "grid.gif"), os.path.join(folder, "grid.mp4")
            small = os.path.exists(gif) and os.path.getsize(gif) <= CLIP_BYTES
            video = gif if small or not os.path.exists(mp4) else mp4
            about = read_json(os.path.join(folder, "prompts.json"))
            about = about if isinstance(about, dict) else {}
            found.append(Sample(int(step), video if os.path.exists(video) else "", about))
    return sorted(found, key=lambda s: s.step)


def judgements(workdir: str) -> list[Judgement]:
    """Of evaluation/<suite>.json, its newest, and evaluation/<suite>-<step>.json; a suite's oldest first."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(workdir), "evaluation", "*.json"))):
        results, stem = read_json(path), os.path.basename(path).removesuffix(".json")
        if stem == "compression":
            continue
        suite, _, step = stem.rpartition("-")
        if not (suite and step.isdigit()):
            suite, step = stem, None
        results = results if isinstance(results, dict) else {"unreadable": f"{stem}.json: expected a JSON object"}
        step = results.get("step", step)
        found.append(Judgement(suite, int(step) if str(step).isdigit() else None, results))
    # The newest stands in both of its files; "-" sorts before ".", so <suite>.json is the one that stays.
    unique = {(j.suite, j.step): j for j in found}.values()
    return sorted(unique, key=lambda j: (j.suite, j.step is None, j.step or 0))
