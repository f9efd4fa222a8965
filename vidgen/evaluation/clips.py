"""Real clips of one size, to set beside drawn ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.feed import cut, read_clip
from vidgen.data.sources import Source, Subset, open_source

Size = tuple[int, int, int]  # frames, height, width


class Sized:
    """The clips of a source that are at least of one size, cut to it: from the start in time, the middle in space.

    With `whole` all of their frames stay. `smaller`: how many clips of the source are not as large.
    """

    def __init__(self, source: Source, size: Size, whole: bool = False):
        frames, height, width = size
        s = source.sizes
        large = np.flatnonzero((s.frames >= frames) & (s.height >= height) & (s.width >= width))
        self._source, self._size, self._whole = Subset(source, large), size, whole
        own = self._source.sizes
        length, *sides = (np.full(len(large), n, np.int32) for n in size)
        self.sizes = ClipSizes(own.frames if whole else length, *sides, own.fps, own.text)
        self.fingerprint = f"{self._source.fingerprint}-{told(size)}{'-whole' if whole else ''}"
        self.smaller = len(s) - len(large)

    def read(self, index: int, epoch: int) -> Clip:
        clip = read_clip(self._source, index, epoch)
        frames, height, width = self._size
        return dataclasses.replace(
            clip, video=cut(clip.video, 0, len(clip.video) if self._whole else frames, height, width)
        )

    def name(self, index: int) -> str:
        return self._source.name(index)

    def captions(self) -> list[str] | None:
        return self._source.captions()


def told(size: Sequence[int]) -> str:
    """Such as 17x64x64."""
    return "x".join(map(str, size))


def sized(config: ConfigDict, split: str, size: Size, whole: bool = False) -> Source:
    """A side of the run's clips, each of (frames, height, width): rendered at that size where the source is
    procedural, else `Sized`. Raises ConfigError where no clip is as large.
    """
    if config.data.source == "moving_shapes":
        return open_source(configs.override(config, {"data.moving_shapes.sizes": (size,)}).data, split)
    every = open_source(config.data, split)
    source = Sized(every, size, whole)
    if not len(source.sizes):
        s = every.sizes
        raise ConfigError(
            f"config.data.source={config.data.source}: no {split} clip has {told(size)} (frames x height x width) or "
            f"more; the largest along each are {s.frames.max()}, {s.height.max()} and {s.width.max()}"
        )
    return source


def spread(total: int, count: int) -> np.ndarray:
    """[n] i64, n ≤ count: places evenly spread over `total`."""
    return np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(np.int64))


def sample_size(config: ConfigDict) -> Size:
    """Of the clips that are drawn."""
    return config.sample.frames, config.sample.height, config.sample.width


def check_frames(config: ConfigDict, suite: str, least: int, why: str) -> None:
    """Raises ConfigError where drawn clips have fewer frames than a suite looks at."""
    if config.sample.frames < least:
        raise ConfigError(
            f"config.sample.frames={config.sample.frames}: --suite {suite} {why}; expected {least} or more frames, "
            "there or by --frames"
        )


@dataclasses.dataclass(frozen=True)
class Real:
    """Clips that were read.

    Attributes:
      clips: in the source's order; `index` [n] i64, where each stands there.
      unused: reason → how many could not be used.
      fingerprint: of the source and of which of its clips were asked for.
      total: clips that the source has.
    """

    clips: list[Clip]
    index: np.ndarray
    unused: dict[str, int]
    fingerprint: str
    total: int

    def notes(self, what: str) -> list[str]:
        return [f"{count} {what} clips could not be used: {reason}" for reason, count in self.unused.items()]


def read(source: Source, count: int) -> Real:
    """`count` clips of pass 0, evenly spread over the source; raises ConfigError where none can be read."""
    chosen = Subset(source, spread(len(source.sizes), count))
    found, index, unused = [], [], Counter()
    for i in range(len(chosen)):
        try:
            found.append(read_clip(chosen, i, 0))
            index.append(i)
        except BadClip as e:
            unused[str(e)] += 1
    if not found:
        raise ConfigError(f"no clip could be read: {dict(unused) or 'the data set is empty'}")
    places = spread(len(source.sizes), count)[index]
    return Real(found, places, dict(unused), chosen.fingerprint, len(source.sizes))


def check_held_out(config: ConfigDict, suite: str) -> None:
    """Raises ConfigError where the held-out clips are the training clips."""
    if config.data.source != "moving_shapes" and config.data.holdout == 0:
        raise ConfigError(
            f"config.data.holdout=0: --suite {suite} compares with clips that were not trained on, and there are none; "
            "train with --config.data.holdout=0.1, or take --suite memorised"
        )


def seen_note(config: ConfigDict) -> list[str]:
    """What to say where the held-out clips are the training clips."""
    seen = config.data.source != "moving_shapes" and config.data.holdout == 0
    return ["config.data.holdout=0: the real clips are clips that were trained on"] if seen else []


def fingerprint(texts: Sequence[str]) -> str:
    """16 hex digits that change with any of the texts and their order."""
    return hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()[:16]
