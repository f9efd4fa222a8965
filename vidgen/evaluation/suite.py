"""What a suite of `vidgen evaluate` is given, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen.diffusion.generator import Generator


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint that is judged.

    Attributes:
      config: of the run, with what was asked for in `config.sample`.
      generator: made of it.
      params: the averaged weights.
      draw: (prompts, seeds, a prompt each, given=None, changes=None) → clips [T,H,W,3] u8, in the prompts' order, with
        progress on stderr. `changes`: {dotted key: value} of the config, such as another sample.frames.
    """

    config: ConfigDict
    generator: Generator
    params: Any
    draw: Callable[..., list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What of a command's flags a suite may look at.

    Attributes:
      prompts: how many clips are drawn.
      clips: how many clips of a data set are looked at.
      seed: of prompts and noise.
      sizes: (frames, height, width) of the held-out loss; none: the run's own.
      levels: noise levels of the held-out loss, in (0, 1), from little noise to much; none: `grid.LEVELS`.
      features: file of the weights of the network that FVD sees clips through; empty: that of the extra [perceptual].
    """

    prompts: int
    clips: int = 0
    seed: int = 0
    sizes: tuple[tuple[int, int, int], ...] = ()
    levels: tuple[float, ...] = ()
    features: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a suite found.

    Attributes:
      figures: what SUITE.json holds, numbers first. Of these, "per_prompt" is a row a clip, "table" {"head", "rows"}
        is for people, "notes" are what to know of the figures.
      decided_by: what the figures depend on and only the suite knows: for the scorecard.
      shown: clips of the picture, six a line; may be none.
      fps: of the picture; 0: config.sample.fps.
    """

    figures: dict[str, Any]
    decided_by: Mapping[str, Any]
    shown: Sequence[np.ndarray] = ()
    fps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of a denoiser.

    Attributes:
      run: what it does; it may count on `check`.
      check: raises ConfigError where a run of this config, with its `config.sample`, can't be judged. Looks at the
        config and at indices of data sets, at no checkpoint.
      flags: of `vidgen evaluate` that it looks at, beside --workdir, --step and --seed.
      clips: what --clips is unless given.
      version: one more whenever the same weights and settings give other figures than before.
    """

    run: Callable[[Subject, Asked], Found]
    check: Callable[[ConfigDict, Asked], None]
    flags: frozenset[str]
    clips: int = 0
    version: int = 1


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [x for x in values if x is not None]
    return float(np.mean(known)) if known else None
