"""Moving shapes: a procedural set of captioned clips with ground truth, in the line of Moving MNIST (Srivastava et
al., arXiv:1502.04681). Nothing is stored: a clip is a function of (seed, split, pass, index), so that every pass shows
new clips, and any of them can be made again.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.data.clip import Clip, ClipSizes
from vidgen.data.scene_captions import LANGUAGES, describe
from vidgen.data.scene_sampling import LEVELS, Combination, combinations, compose, heldout, shows
from vidgen.data.scenes import Scene, render

SPLITS = ("train", "heldout")
_LEAST = (1, 16, 16)  # frames, height, width: below, shapes cannot be told apart
_VERSION = 1  # of what is drawn: one more whenever the same index gives another clip


@dataclasses.dataclass(frozen=True)
class MovingShapes:
    """A `Source` of procedural clips.

    Attributes:
      level: a key of LEVELS.
      clips: in a pass.
      shapes: (frames, height, width) that a clip may have, drawn alike by its index.
      fps: frames a second; motions are scaled to the length of a clip, whatever its fps.
      languages: of the captions, drawn alike: keys of LANGUAGES.
      heldout: share of the combinations of shape, colour and motion that no object has in the split "train".
      split: "train", or "heldout": clips whose first object is such a combination.
      seed: of all scenes.
    """

    level: str
    clips: int
    shapes: tuple[tuple[int, int, int], ...]
    fps: float
    languages: tuple[str, ...]
    heldout: float
    split: str = "train"
    seed: int = 0

    @classmethod
    def from_config(cls, config: Any, split: str = "train") -> MovingShapes:
        """From `config.data.moving_shapes`, of which each value is checked: raises ConfigError."""
        _one_of("level", config.level, LEVELS)
        _one_of("split", split, SPLITS)
        languages = (config.languages,) if isinstance(config.languages, str) else tuple(config.languages)
        for language in languages or ("",):
            _one_of("languages", language, LANGUAGES)
        if config.clips < 1:
            raise ConfigError(f"{_KEY}clips={config.clips}: expected at least 1")
        if not config.fps > 0:
            raise ConfigError(f"{_KEY}fps={config.fps}: expected more than 0")
        if not 0 <= config.heldout <= 0.5:
            raise ConfigError(f"{_KEY}heldout={config.heldout}: expected a share from 0 to 0.5")
        source = cls(
            config.level, config.clips, _sizes(config.sizes), config.fps, languages, float(config.heldout), split
        )
        for size in source.shapes:
            if not source.first(size[0]):
                raise ConfigError(
                    f"{_KEY}heldout={config.heldout}: no combination is left in the split {split!r} for clips of "
                    f"{size[0]} frames; expected around 0.2"
                )
        return source

    def __reduce__(self):
        # The columns of `sizes` are cheaper made again than sent to a worker.
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def sizes(self) -> ClipSizes:
        """The index: drawn from the seed alone, so the same in all passes."""
        pick = np.random.default_rng(self.seed).integers(len(self.shapes), size=self.clips)
        frames, height, width = np.asarray(self.shapes, np.int32).T[:, pick]
        fps = np.full(self.clips, self.fps, np.float32)
        return ClipSizes(frames, height, width, fps, np.full(self.clips, LEVELS[self.level].caption, np.int32))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with every setting, the level's table and the version of this code."""
        return hashlib.sha256(repr((_VERSION, self, LEVELS[self.level])).encode()).hexdigest()[:16]

    def first(self, frames: int) -> list[Combination]:
        """Combinations that the first object of a clip of so many frames may be."""
        return _allowed(self.level, self.heldout, self.split, frames)

    def compose(
        self, rng: np.random.Generator, size: tuple[int, int, int], first: Combination | None = None
    ) -> tuple[Scene, str]:
        """Draws a scene of (frames, height, width) and its caption; `first`: what its first object is, or drawn too."""
        options = self.first(size[0])
        first = first or options[rng.integers(len(options))]
        level = LEVELS[self.level]
        scene = compose(rng, level, first, _allowed(self.level, self.heldout, "train", size[0]), size)
        language = self.languages[rng.integers(len(self.languages))]
        return scene, describe(scene, rng, language, moving=size[0] > 1, limit=level.caption)

    def scene(self, index: int, epoch: int) -> tuple[Scene, str]:
        """Ground truth and caption of clip `index` in pass `epoch`."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), epoch, index))
        return self.compose(rng, self.size(index))

    def size(self, index: int) -> tuple[int, int, int]:
        """(frames, height, width) of clip `index`."""
        return int(self.sizes.frames[index]), int(self.sizes.height[index]), int(self.sizes.width[index])

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` of pass `epoch`, drawn."""
        scene, caption = self.scene(index, epoch)
        return Clip(render(scene, *self.size(index)), caption, self.fps)

    def name(self, index: int) -> str:
        """Level, split and index: all that `scene` needs, but the pass."""
        return f"moving_shapes/{self.level}/{self.split}/{index}"

    def captions(self) -> None:
        """Each pass has others."""
        return None


@functools.lru_cache
def _allowed(level: str, share: float, split: str, frames: int) -> list[Combination]:
    held = set(heldout(LEVELS[level], share))
    every = combinations(LEVELS[level])
    return [c for c in every if (c in held) == (split == "heldout") and shows(c[2], frames)]


_KEY = "config.data.moving_shapes."


def _one_of(key: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        near = difflib.get_close_matches(str(value), list(options), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{_KEY}{key}: {value!r} is unknown, expected one of {', '.join(options)}{hint}")


def _sizes(sizes: Any) -> tuple[tuple[int, int, int], ...]:
    """Checks the setting `sizes`."""
    for size in sizes:
        whole = isinstance(size, tuple | list) and len(size) == 3 and all(isinstance(n, int) for n in size)
        if not whole or any(n < least for n, least in zip(size, _LEAST, strict=True)):
            raise ConfigError(f"{_KEY}sizes: {size!r}: expected (frames, height, width), at least {_LEAST}")
    if not sizes:
        raise ConfigError(f"{_KEY}sizes is empty, expected at least one (frames, height, width), like (17, 32, 32)")
    return tuple(tuple(size) for size in sizes)
