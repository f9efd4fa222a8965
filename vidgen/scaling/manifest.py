"""What a sweep consists of, on disk: DIR/manifest.json says which runs there are, DIR/runs/NAME how each of them did.

A run has ended when its folder holds result.json, which it writes itself, in one move; so whoever drives the sweep may
be killed at any moment and nothing is lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import secrets
from vidgen.config import ConfigError
from vidgen.scaling.algebra import LABEL, Space, labels_of, settings_of
from vidgen.studio import media

NAME = 80  # characters of a name made of settings; a longer one is cut, with a digest at its end
LONGEST = 200  # of one that the sweep gives: file systems take 255, with what is put behind it
RESULT = "result.json"
# Columns that the results have by themselves; a label of that name would stand in their place.
OWN = ("status", "error", "parameters", "tokens", "flops", "loss", "steps", "seconds", "skipped_steps",
       "unreadable_clips")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      settings: by dotted key, on top of the sweep's config.
      labels: columns of the results that are no settings.
      varied: the keys among `settings` in which runs of the sweep differ.
      cost: parameters, tokens, flops and steps that it will have.
    """

    name: str
    settings: dict[str, Any]
    labels: dict[str, Any]
    varied: tuple[str, ...]
    cost: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A sweep's runs and what they have in common.

    Attributes:
      config: FILE or FILE:arg that all start from; `base`: what it held, as JSON has it; empty
        in sweeps that an older vidgen began, whose runs read the file.
      suites: of `vidgen evaluate`, for each run when it is trained.
      prompts: clips that those judge.
      runs: all of them.
    """

    config: str
    base: dict[str, Any]
    suites: tuple[str, ...]
    prompts: int
    runs: tuple[Run, ...]


def expand(points: Space) -> tuple[Run, ...]:
    """Runs of the points of a space, named by what they differ in.

    Raises ConfigError where there are none, for points that are the same run or have the same `label.name`, for a label
    that is called like another column of the results, for a value that no JSON file holds, and for a credential.
    """
    if not points:
        raise ConfigError("the sweep expands to no runs; expected at least one")
    points = tuple({key: _plain(key, value) for key, value in point.items()} for point in points)
    if held := [key for point in points for key in secrets.credentials(settings_of(point))]:
        raise ConfigError(
            f"config.{held[0]} holds a credential, which a sweep would keep on disk; expected none: leave it to the "
            "environment"
        )
    every = sorted({key for point in points for key in settings_of(point)})
    seen = {key: {json.dumps(point.get(key), sort_keys=True) for point in points} for key in every}
    varied = tuple(key for key in every if len(seen[key]) > 1)
    runs = []
    for point in points:
        labels = labels_of(point)
        if taken := [label for label in labels if label in (*OWN, *every)]:
            raise ConfigError(f"{LABEL}{taken[0]}: the results have a column {taken[0]} already; take another name")
        name = str(labels.pop("name", "")) or short({k: point[k] for k in varied if k in point})
        if not _fits(name):
            raise ConfigError(f"{LABEL}name={name!r}: expected letters, digits and . _ = , + - only: it names a folder")
        if len(name) > LONGEST:
            raise ConfigError(f"{LABEL}name={name[:30]}…: {len(name)} characters; expected at most {LONGEST}")
        runs.append(Run(name, settings_of(point), labels, varied))
    same = Counter(_text(run.settings) for run in runs)
    if (twice := same.most_common(1)[0])[1] > 1:
        raise ConfigError(f"the sweep has {twice[1]} runs of the same settings: {twice[0][:300]}; expected each once")
    names = Counter(run.name for run in runs)
    if (twice := names.most_common(1)[0])[1] > 1:
        raise ConfigError(f"the sweep has {twice[1]} runs named {twice[0]!r}; expected names of their own")
    return tuple(runs)


def short(settings: Mapping[str, Any]) -> str:
    """A name of settings: `width64-lr0.001`."""
    parts = []
    for key, value in settings.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        parts.append(re.sub(r"[^\w.=,+-]+", "_", f"{key.rpartition('.')[2]}{shown}").strip("_"))
    name = "-".join(parts) or "run"
    if len(name) <= NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: NAME - 9]}-{digest}"


def config_of(manifest: Manifest, run: Run) -> ConfigDict:
    """A run's own, of what the config was when the sweep was planned; raises ConfigError."""
    if not manifest.base:
        return configs.load(manifest.config, run.settings)
    return configs.override(configs.from_json(json.dumps(manifest.base)), run.settings)


def write(folder: str, manifest: Manifest) -> None:
    """DIR/manifest.json, in one move.

    Raises ConfigError where another sweep lies there: other suites, a config that has been edited since, or a run of
    the same name with other settings or of the same settings with another name.
    """
    path = os.path.join(folder, "manifest.json")
    if os.path.exists(path):
        old = read(folder)
        then, now = (configs.from_json(json.dumps(held.base)) for held in (old, manifest))
        for key in configs.difference(then, now) if old.base else ():
            if any(key not in run.settings for run in manifest.runs):
                was, is_ = (operator.attrgetter(key)(held) for held in (then, now))
                raise ConfigError(
                    f"{path}: the sweep began with config.{key}={was!r}, and {manifest.config} has {is_!r} now; its "
                    "runs would not be alike: take another --output"
                )
        for field in ("config", "suites", "prompts"):
            if getattr(old, field) != getattr(manifest, field):
                raise ConfigError(
                    f"{path}: a sweep with {field}={getattr(old, field)!r} lies there, not "
                    f"{getattr(manifest, field)!r}; take another --output"
                )
        known = {run.name: run for run in old.runs}
        for run in manifest.runs:
            if (was := known.get(run.name)) and _text(was.settings) != _text(run.settings):
                raise ConfigError(f"{path}: run {run.name} has other settings there; take another --output")
        # Those that the sweep no longer names stay: what they found is not lost.
        names = {run.name for run in manifest.runs}
        gone = tuple(run for run in old.runs if run.name not in names)
        called = {_text(run.settings): run.name for run in gone}
        for run in manifest.runs:
            if was := called.get(_text(run.settings)):
                raise ConfigError(
                    f"{path}: run {run.name} is there as {was}, and no run is made twice; give it {LABEL}name={was}, "
                    "or take another --output"
                )
        manifest = dataclasses.replace(manifest, runs=manifest.runs + gone)
    media.write(path, json.dumps(dataclasses.asdict(manifest), indent=1).encode())


def read(folder: str) -> Manifest:
    """Raises ConfigError where there is none, or it can't be read."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        runs = tuple(Run(**run | {"varied": tuple(run["varied"])}) for run in found.pop("runs"))
        if wrong := [run.name for run in runs if not _fits(run.name)]:
            raise ValueError(f"run {wrong[0]!r} is no name of a folder")
        return Manifest(**{"base": {}} | found | {"suites": tuple(found["suites"]), "runs": runs})
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected the folder of a sweep") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: not the manifest of a sweep: {e}") from None


def workdir(folder: str, name: str) -> str:
    """Of a run."""
    return os.path.join(folder, "runs", name)


def result(folder: str, name: str) -> dict[str, Any] | None:
    """What a run's result.json says: "status" done or failed, "error", figures; None where it hasn't ended."""
    path = os.path.join(workdir(folder, name), RESULT)
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        if not isinstance(found, dict) or found.get("status") not in ("done", "failed"):
            raise ValueError("no status done or failed in it")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: {e}; expected what a run of a sweep wrote; without it the run goes on") from None


def finite(value: Any) -> bool:
    """Whether a figure is a number that can be fitted."""
    return isinstance(value, int | float) and math.isfinite(value)


def _fits(name: str) -> bool:
    """Whether a run may be called so: its folder has that name."""
    return bool(re.fullmatch(r"[\w.=,+-]+", name)) and name not in (".", "..")


def _plain(key: str, value: Any) -> Any:
    """A value as JSON takes it: NumPy's numbers as Python's. Raises ConfigError."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={value!r}: expected numbers, text, or tuples of them") from None
    return value


def _text(settings: Mapping[str, Any]) -> str:
    """Settings as text, the same for what went through JSON and what did not."""
    return json.dumps(settings, sort_keys=True)
