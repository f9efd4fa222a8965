"""`vidgen evaluate`: what a trained model gets right, and what a tokenizer leaves of a clip."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import perceptual, sample
from vidgen.config import ConfigError
from vidgen.data.progress import Progress
from vidgen.diffusion.generator import Generator
from vidgen.evaluation import distance, grid, memorised, moving_shapes, nearest, scorecard, shapes_suites, vbench
from vidgen.evaluation.suite import Asked, Found, Subject, Suite
from vidgen.plain import plain
from vidgen.studio import media, report
from vidgen.tokenizers import base as tokenizers
from vidgen.training import restored
from vidgen.training.checkpoint import Checkpoints, read_config

PROMPTS, CLIPS = 144, 64  # unless --prompts and --clips say otherwise
SOLVING = frozenset({"solver", "steps", "guidance", "guidance_2", "eta"})
DRAWING = SOLVING | {"frames", "height", "width", "fps"}

# What a denoiser is judged by; reconstruction, of a tokenizer, stands beside them.
SUITES = {
    "moving_shapes": Suite(shapes_suites.run, shapes_suites.check, DRAWING | {"prompts"}),
    "first_frame": Suite(shapes_suites.run_first_frame, shapes_suites.check_first_frame, DRAWING | {"prompts"}),
    "memorised": Suite(memorised.run, memorised.check, SOLVING | {"prompts"}),  # each clip at its own size
    "heldout": Suite(grid.run, grid.check, frozenset({"clips", "size", "levels"}), clips=CLIPS, version=2),
    "fvd": Suite(distance.run, distance.check, DRAWING | {"prompts", "features"}),
    "vbench": Suite(vbench.run, vbench.check, DRAWING | {"prompts"}, version=2),
    "nearest": Suite(nearest.run, nearest.check, DRAWING | {"prompts", "clips"}, clips=4096, version=2),
}
RECONSTRUCTION = frozenset({"tokenizer", "input", "clips", "nofvd", "frames"})
OF_TOKENIZER = 1  # version of the suite reconstruction


def run(
    workdir: str,
    suite: str = "",
    *,
    prompts: int = PROMPTS,
    seed: int = 0,
    step: int | None = None,
    tokenizers: Sequence[str] = (),
    inputs: Sequence[str] = (),
    clips: int | None = None,
    fvd: bool = True,
    sizes: Sequence[str] = (),
    levels: str = "",
    features: str = "",
    **settings: Any,
) -> dict:
    """Evaluates the averaged weights of a checkpoint, or the run's tokenizer.

    Writes WORKDIR/evaluation/SUITE.json, SUITE-<step>.json (which stays, as history) and, of suites that look at clips,
    SUITE.gif and .mp4, the clips that were judged; the suite reconstruction also its worst clips and compression.json,
    .svg and .html.

    Args:
      workdir: of a training run.
      suite: a key of SUITES or reconstruction, or several, with commas between; empty: reconstruction for a VAE,
        moving_shapes for a run on moving shapes, memorised for any other.
      prompts: how many clips are drawn and judged.
      seed: of the prompts and the noise.
      step: of the checkpoint; None: the newest.
      tokenizers, inputs, fvd: of the suite reconstruction: see `evaluation/reconstruction.py`.
      clips: how many clips of a data set are looked at; None: 64 (of each size in heldout), 4096 in nearest.
      sizes: of the suite heldout, "FRAMESxHEIGHTxWIDTH" each; none: the run's own.
      levels: of the suite heldout, noise levels within 0 to 1 with commas between; empty: the middles of eighths.
      features: of the suite fvd: other weights, see `evaluation/distance.py`.
      **settings: instead of the keys of `config.sample`: frames, height, width, fps, solver, steps, guidance, eta. Of
        these, reconstruction takes frames: of a clip at most.

    Returns what SUITE.json holds: "suite", "step", the figures, and "scorecard", every setting that decides them and
    the command that makes them again. Of several suites {"suites": {name: that}}. Raises ConfigError.
    """
    names = _known(suite)
    for name, value, least in (("prompts", prompts, 1), ("seed", seed, 0), ("clips", clips, 1)):
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value}: expected {f'at least {least}' if least else '0 or more'}")
    config = read_config(workdir)
    names = names or [_suite_of(config)]
    given = {"prompts": prompts != PROMPTS, "seed": seed != 0, "step": step is not None, "clips": clips is not None}
    given |= {"tokenizer": tokenizers, "input": inputs, "nofvd": not fvd, "features": features}
    given |= {"size": sizes, "levels": levels}
    given |= {name: value is not None for name, value in settings.items()}
    _check_flags([name for name, is_given in given.items() if is_given], names)
    asked = Asked(prompts, 0, seed, tuple(map(_size, sizes)), _levels(levels) if levels else (), features)

    if names != ["reconstruction"]:
        own = restored.run_config(workdir)
        sample.override(own, settings)
        check(own, names, asked)

    subject, found = None, {}
    for name in names:
        if name == "reconstruction":
            found[name] = _reconstruction(
                workdir, config, tokenizers, inputs, CLIPS if clips is None else clips, settings.get("frames"), fvd
            )
            continue
        if subject is None:
            subject, step = _subject(workdir, step, settings)
        found[name] = _judge(workdir, name, config, subject, step, asked, clips)
    return found[names[0]] if len(names) == 1 else {"suites": found}


def check(config: ConfigDict, suites: Sequence[str], asked: Asked) -> None:
    """Raises ConfigError where one of the suites could not judge a run of this config, whatever it has learned.

    `run` asks this first; what trains runs to have them judged can ask before it trains. Clips of `config.sample` that
    are too short for a suite, held-out clips or an extra that are missing, nothing to measure: all is known by then. It
    opens the data set of the run, and reads neither clips nor weights.

    Args:
      config: of the run, with what it is judged with in `config.sample`.
      suites: keys of SUITES; or reconstruction, which looks at its own arguments later.
      asked: what else is asked for; `Asked(prompts)` where nothing is.
    """
    for name in _known(",".join(suites)):
        if name == "reconstruction":
            continue
        if config.task != "denoiser":
            raise ConfigError(
                f"config.task={config.task}: --suite {name} judges what is drawn from prompts; expected task=denoiser, "
                "or --suite reconstruction"
            )
        suite = SUITES[name]
        if "frames" in suite.flags:
            sample.check_size(config, tokenizers.geometry_from_config(config.tokenizer, config.vae))
        suite.check(config, asked)


def _known(suite: str) -> list[str]:
    """The suites that a text with commas names, each once; none where it is empty."""
    known = (*SUITES, "reconstruction")
    names = list(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip()))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown suite {name!r}: known are {', '.join(known)}{hint}")
    return names


def _suite_of(config: ConfigDict) -> str:
    """The suite that fits a run."""
    if config.task == "vae":
        return "reconstruction"
    return "moving_shapes" if config.data.source == "moving_shapes" else "memorised"


def _check_flags(given: Sequence[str], names: Sequence[str]) -> None:
    """Raises ConfigError for a flag that none of the suites looks at."""
    taken: set[str] = set()
    for name in names:
        taken |= RECONSTRUCTION if name == "reconstruction" else SUITES[name].flags | {"step", "seed"}
    if flag := next((flag for flag in given if flag not in taken), ""):
        raise ConfigError(f"--{flag} has no meaning with --suite {','.join(names)}; leave it out")


def _size(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--size={text}: expected FRAMESxHEIGHTxWIDTH in pixels, such as 9x32x32")
    return tuple(map(int, parts))


def _levels(text: str) -> tuple[float, ...]:
    """Each once, from little noise to much."""
    found = set()
    for part in text.split(","):
        try:
            level = float(part)
        except ValueError:
            level = 0.0
        if not 0 < level < 1:
            raise ConfigError(
                f"--levels={text}: {part.strip()!r} is no noise level; expected numbers between 0 (clean) and 1 "
                "(noise), commas between them, such as 0.25,0.5,0.75"
            )
        found.add(level)
    return tuple(sorted(found))


def _subject(workdir: str, step: int | None, settings: dict[str, Any]) -> tuple[Subject, int]:
    """The checkpoint that is judged, and its step."""
    config, generator, params, step = restored.load(workdir, step)
    sample.override(config, settings)

    def draw(prompts: Sequence[str], seeds: Sequence[int], given: Any = None, changes: Any = None) -> list[np.ndarray]:
        own = configs.override(config, changes) if changes else config
        return _drawn(own, generator, params, prompts, seeds, given)

    return Subject(config, generator, params, draw), step


def _drawn(
    config: ConfigDict,
    generator: Generator,
    params: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    given: Sequence[Any] | None,
) -> list[np.ndarray]:
    """Clips of prompts, a seed each, in pieces of one shape, and how far that is."""
    total, at_once = len(prompts), min(sample.CLIPS_AT_ONCE, len(prompts))
    progress, videos = Progress("drawing", total), []
    for first in range(0, total, at_once):
        places = [min(i, total - 1) for i in range(first, first + at_once)]
        some = None if given is None else [given[i] for i in places]
        texts, own = [prompts[i] for i in places], [seeds[i] for i in places]
        videos += sample.draw(config, generator, params, texts, seeds=own, zipped=True, given=some)
        progress.update(min(len(videos), total), f"{min(len(videos), total)} of {total} clips")
    progress.close()
    return videos[:total]


def _judge(
    workdir: str, name: str, config: ConfigDict, subject: Subject, step: int, asked: Asked, clips: int | None
) -> dict[str, Any]:
    """Runs a suite of a denoiser and writes what it found."""
    suite = SUITES[name]
    asked = dataclasses.replace(asked, clips=suite.clips if clips is None else clips)
    found: Found = suite.run(subject, asked)
    s = subject.config.sample
    flags: dict[str, Any] = {"step": step, "seed": asked.seed}
    flags |= {key: getattr(asked, key) for key in ("prompts", "clips") if key in suite.flags}
    flags |= {key: s[key] for key in sorted(DRAWING & suite.flags) if key not in ("eta", "guidance_2") or s[key]}
    if "size" in suite.flags:
        flags["size"] = list(found.decided_by["sizes"])
    if "levels" in suite.flags:
        flags["levels"] = grid.told_levels(asked.levels or grid.LEVELS)
    if "features" in suite.flags and asked.features:
        flags["features"] = os.path.abspath(asked.features)
    about = {"seed": asked.seed, "weights": f"averaged, config.optimizer.ema={config.optimizer.ema}"}
    about |= {"tokenizer": subject.generator.tokenizer.digest, "data": config.data.to_dict()}
    about |= {"text": subject.generator.text.digest} if subject.generator.text else {}
    drawn = {"sample": s.to_dict()} if DRAWING & suite.flags else {}
    card = scorecard.of(workdir, name, suite.version, config, step, flags, about | drawn | dict(found.decided_by))
    results = {"suite": name, "step": step, **found.figures, **drawn, "scorecard": card}
    pictures = {}
    if len(found.shown):
        scale = max(1, sample.scale_for(found.shown[0].shape[2]) // 2)
        pictures = {name: (media.grid(found.shown, columns=6, scale=scale), found.fps or s.fps)}
    _write(workdir, results, pictures)
    return results


def _reconstruction(
    workdir: str,
    config: ConfigDict,
    tokenizers: Sequence[str],
    inputs: Sequence[str],
    clips: int,
    frames: int | None,
    fvd: bool,
) -> dict[str, Any]:
    """What tokenizers lose; see `evaluation/reconstruction.py`."""
    from vidgen.evaluation import reconstruction

    figures, pictures = reconstruction.run(
        workdir, tokenizers=tokenizers, inputs=inputs, clips=clips, frames=frames or 0, with_fvd=fvd
    )
    step = newest_step(workdir)
    flags = {"clips": clips, "frames": frames, "fvd": fvd, "tokenizer": list(tokenizers), "input": list(inputs)}
    networks = ("lpips", *(["i3d"] if fvd else []))
    decided_by = {
        "settings": figures["settings"],
        "tokenizers": {name: about["digest"] for name, about in figures["tokenizers"].items()},
        "networks": {name: perceptual.ASSETS[name].digest for name in networks if not perceptual.missing(name)},
    }
    card = scorecard.of(workdir, "reconstruction", OF_TOKENIZER, config, step, flags, decided_by)
    results = {"suite": "reconstruction", "step": step, **figures, "scorecard": card}
    _write(workdir, results, pictures)
    return results


def newest_step(workdir: str) -> int | None:
    """Of the checkpoints; None where there are none."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.latest
    finally:
        checkpoints.close()


def _write(workdir: str, results: dict[str, Any], pictures: dict[str, tuple[np.ndarray, float]]) -> None:
    suite, step = results["suite"], results["step"]
    folder = os.path.join(workdir, "evaluation")
    text = json.dumps(plain(results), ensure_ascii=False, indent=2).encode()
    for name in (f"{suite}.json", *([f"{suite}-{step}.json"] if step is not None else [])):
        media.write(os.path.join(folder, name), text)
    for name, (video, fps) in pictures.items():
        for kind in ("gif", "mp4"):
            media.save_video(os.path.join(folder, f"{name}.{kind}"), video, fps)


def table(results: dict[str, Any]) -> str:
    """The figures of `run` for a terminal."""
    if "suites" in results:
        return "\n\n".join(map(table, results["suites"].values()))
    lines = [f"{results['suite']}, step {results['step']}"]
    if results["suite"] == "reconstruction":
        from vidgen.evaluation import reconstruction

        return "\n".join([*lines, reconstruction.told(results)])
    beside = report.in_table(results) | {"step"}
    numbers = {name: x for name, x in results.items() if type(x) in (int, float) and name not in beside}
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        as_share = name in moving_shapes.RATES and results["suite"] in ("moving_shapes", "first_frame")
        lines.append(f"  {name:<{width}} {f'{value:.1%}' if as_share else f'{value:.4g}':>8}")
    if told := results.get("table"):
        lines += ["", *_columns([told["head"], *told["rows"]])]
    lines += [f"  note: {note}" for note in results.get("notes", ())]
    return "\n".join([*lines, f"  again: {results['scorecard']['command']}"])


def _columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table, the first column to the left."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

    cells = [list(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{c:{'>' if i else '<'}{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]


def brief(results: dict[str, Any]) -> dict[str, Any]:
    """What `run` gave without its rows a clip."""
    if "suites" in results:
        return {"suites": {name: brief(own) for name, own in results["suites"].items()}}
    return {name: value for name, value in results.items() if name not in ("per_prompt", "per_clip")}
