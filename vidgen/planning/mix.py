"""The clips that a plan supposes a step to hold, where there are no data to look at."""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.data.moving_shapes import MovingShapes
from vidgen.data.packing import Packing, Row
from vidgen.geometry import Geometry
from vidgen.models.dit import layer_pattern
from vidgen.planning.flops import Pairs

CLIPS = 4096  # of the procedural set that are packed for a plan, in milliseconds
STEPS = 8  # whose mean is a typical step: one step's rows hold clips of like sizes


@dataclasses.dataclass(frozen=True)
class Mix:
    """Some typical steps.

    Attributes:
      words: what they hold, "1 clip of 81x720x1280 a row".
      clips: of each row of all steps: (its token grid (t, y, x), its text tokens).
      tokens: S of a row.
      steps: how many steps these are.
      tick: the t coordinate of a token less that of the one before: 1, or eighths of a second.
    """

    words: str
    clips: tuple[tuple[tuple[tuple[int, int, int], int], ...], ...]
    tokens: int
    steps: int
    tick: float = 1.0

    @property
    def trained(self) -> float:
        """Tokens of a step that belong to a clip."""
        return sum(t * y * x for row in self.clips for (t, y, x), _ in row) / self.steps

    def ids(self, row: int = 0) -> np.ndarray:
        """[S] i32: the segments of a row, 0 = padding."""
        lengths = [t * y * x for (t, y, x), _ in self.clips[row]]
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return np.pad(ids, (0, self.tokens - len(ids))).astype(np.int32)

    def text_ids(self, row: int, length: int) -> np.ndarray:
        """[length] i32: whose caption each text token of a row is, 0 = padding."""
        lengths = [text for _, text in self.clips[row]]
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
        return np.pad(ids, (0, length - len(ids))).astype(np.int32)

    def coords(self, row: int = 0) -> np.ndarray:
        """[S,3] f32: (t, y, x) of a row's tokens, from 0 in each clip; 0 in padding."""
        grids = [np.indices(grid).reshape(3, -1).T for grid, _ in self.clips[row]]
        coords = np.concatenate(grids) * (self.tick, 1, 1) if grids else np.zeros((0, 3))
        return np.pad(coords, ((0, self.tokens - len(coords)), (0, 0))).astype(np.float32)

    @functools.lru_cache(maxsize=16)  # noqa: B019 - of a few frozen ones, in a search thousands of times
    def pairs(self, window: tuple[int, ...] = (), full_every: int = 0) -> Pairs:
        """The useful pairs of a step; `window`, `full_every`: as in `config.model`."""
        clips = [clip for row in self.clips for clip in row]
        tokens = np.array([t * y * x for (t, y, x), _ in clips], float)
        text = np.array([text for _, text in clips], float)
        windowed = 0.0
        for kind, share in windowed_layers(window, full_every).items():
            windowed += share * sum(window_pairs(g, window, kind == "shifted", self.tick) for g, _ in clips)
        sums = (tokens**2).sum(), windowed, (tokens * text).sum(), (text**2).sum()
        return Pairs(*(float(total) / self.steps for total in sums))


def windowed_layers(window: tuple[int, ...], full_every: int) -> dict[str, float]:
    """Of the layers that have windows, the share of each kind: window, and shifted by half a window."""
    kinds = [kind for kind in layer_pattern(window, full_every) if kind != "segment"]
    return {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}


def window_pairs(grid: tuple[int, int, int], window: tuple[int, ...], moved: bool, tick: float = 1.0) -> int:
    """Σ over the 3D windows of one clip of tokens², windows as `vidgen.models.windows.window_ids` has them.

    Args:
      grid: tokens (t, y, x) of the clip.
      window: `config.model.window`.
      moved: whether windows begin half a window before the clip.
      tick: as `Mix.tick`.
    """
    pairs = 1
    for n, size, unit in zip(grid, window, (tick, 1.0, 1.0), strict=True):
        place = np.floor((np.arange(n) * unit + (size / 2 if moved else 0) + 1e-3) / size).astype(int)
        pairs *= int((np.bincount(place) ** 2).sum())
    return pairs


def typical(config: ConfigDict, geometry: Geometry) -> Mix:
    """The mix of `config`: the procedural set packed as in training, else one clip of `config.sample`'s size a row.

    Raises ConfigError where no clip fits into a row.
    """
    if config.data.source != "moving_shapes":
        return one_clip(config, geometry)
    shapes = ConfigDict(config.data.moving_shapes)
    shapes.clips = min(shapes.clips, CLIPS)
    packing = Packing(MovingShapes.from_config(shapes).sizes, geometry, config.rows, config.seed)
    steps = min(STEPS, packing.steps_per_epoch)
    rows = tuple(row for step in range(steps) for row in packing.step(step))
    clips = tuple(tuple(_clip(geometry, p, config.text.pad) for p in row) for row in rows)
    return Mix(_words(rows), clips, config.rows.tokens, steps, _tick(config, geometry, shapes.fps))


def one_clip(config: ConfigDict, geometry: Geometry) -> Mix:
    """A clip of `config.sample`'s size in each row, with a caption as long as they may be.

    Raises ConfigError where it does not fit.
    """
    s, r = config.sample, config.rows
    size = geometry.cover(s.frames, s.height, s.width)
    tokens = geometry.tokens(*size)
    if tokens > r.tokens:
        raise ConfigError(
            f"config.sample: a clip of {'x'.join(map(str, size))} is {tokens} tokens and does not fit into "
            f"config.rows.tokens={r.tokens}; nearest: config.rows.tokens={tokens}"
        )
    row = ((geometry.grid(*size), min(r.caption, r.text)),)
    words = f"1 clip of {'x'.join(map(str, size))} a row"
    return Mix(words, (row,) * r.count, r.tokens, 1, _tick(config, geometry, s.fps))


def _tick(config: ConfigDict, geometry: Geometry, fps: float) -> float:
    return geometry.block[0] / fps * 8 if config.model.time_in_seconds else 1.0


def _clip(geometry: Geometry, placed, pad: int) -> tuple[tuple[int, int, int], int]:
    return tuple(map(int, geometry.grid(placed.frames, placed.height, placed.width))), max(placed.text, pad)


def _words(rows: tuple[Row, ...]) -> str:
    counts = collections.Counter(f"{p.frames}x{p.height}x{p.width}" for row in rows for p in row)
    a_row = sum(counts.values()) / len(rows)
    if len(counts) == 1:
        return f"{a_row:g} clip{'s' * (a_row != 1)} of {next(iter(counts))} a row"
    share = {size: count / sum(counts.values()) for size, count in counts.most_common(4)}
    shown = ", ".join(f"{part:.0%} of {size}" for size, part in share.items())
    more = f" and {len(counts) - 4} more sizes" if len(counts) > 4 else ""
    return f"{a_row:.1f} clips a row: {shown}{more}"
