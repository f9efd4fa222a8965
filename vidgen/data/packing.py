"""Which clips stand in which row of which step, computed from (seed, step) and the index of sizes alone.

Clips are sorted by what they need of a row (tokens, then text) and cut into *groups* of B neighbours, one for each
row of a step. A step is packed with whole groups under the three capacities of a row (S tokens, L text tokens,
K segments), so its rows hold clips of like sizes: they are filled alike, and their attention, which costs Σ tokens²
over segments, is balanced by construction. How needs combine into steps is decided once, in windows of the shuffled
groups. What an epoch draws anew is which of the clips of equal need stands where, in which row, and the order of the
steps; all three are permutations by arithmetic, so any step is found without the steps before it.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.data.clip import ClipSizes
from vidgen.data.order import mix, permute
from vidgen.geometry import Geometry

MIN_STEPS = 256  # of an epoch and of a window: a step that is left part empty at the end is then a small share
MAX_PLACES = 1 << 22  # clips x passes that are planned at once, where several passes are a choice

TOO_LARGE = "too large: one frame exceeds the row"
TOO_SMALL = "smaller than one token"
NO_SIZE = "unreadable: no size in the index"


class Placed(NamedTuple):
    """A clip in its row.

    Attributes:
      clip: its place in the index.
      epoch: which pass over the data this is, from 0; a clip is placed once a pass.
      frames, height, width: what is cut out of it: whole tokens.
      token_start, tokens: its tokens in the row.
      text_start, text: the text tokens kept for its caption in the row.
      segment: 1..K.
    """

    clip: int
    epoch: int
    frames: int
    height: int
    width: int
    token_start: int
    tokens: int
    text_start: int
    text: int
    segment: int


Row = tuple[Placed, ...]


@dataclasses.dataclass(frozen=True)
class PackingStats:
    """How well steps are packed.

    Attributes:
      fill: share of the B·S tokens of a step that belong to a clip.
      text_fill: share of the B·L text tokens kept for a caption.
      flops_spread_mean, flops_spread_max: attention FLOPs of a step's rows, largest / smallest - 1, over steps;
        rows without a clip are left out.
      balanced: share of the steps whose spread is at most 10 %.
      clips_per_row: mean.
      empty_rows: rows without a clip.
      cropped: clips of the index cut in time because they are longer than a row.
      refused: clips of the index that are never placed: reason → count.
      captions_cut: placed clips of the index whose caption is longer than `rows.caption`.
    """

    fill: float
    text_fill: float
    flops_spread_mean: float
    flops_spread_max: float
    balanced: float
    clips_per_row: float
    empty_rows: int
    cropped: int
    refused: dict[str, int]
    captions_cut: int

    def __str__(self) -> str:
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items()) or "none"
        return (
            f"fill {self.fill:.1%} (text {self.text_fill:.1%}), attention FLOPs of a step's rows within"
            f" {self.flops_spread_mean:.1%} (worst {self.flops_spread_max:.1%}; {self.balanced:.1%} of steps within"
            f" 10%), {self.clips_per_row:.1f} clips a row, {self.cropped} clips cropped in time,"
            f" {self.captions_cut} captions cut, refused: {refused}"
        )


class Packing:
    """The plan of a run: step → rows.

    Attributes:
      steps_per_epoch: steps that show every clip `passes` times.
      passes: passes over the data that are packed together: 1 unless the data are so few that a pass is a few steps.
      sizes: [n,3] i32, the distinct (frames, height, width) that clips are trained on in.
      cropped, refused, captions_cut: as in `PackingStats`.
    """

    def __init__(
        self,
        sizes: ClipSizes,
        geometry: Geometry,
        rows: ConfigDict,
        seed: int,
        text: np.ndarray | None = None,
        pad: int = 0,
    ):
        """Plans; sorts the index once and holds a few integers a clip.

        Args:
          sizes: of the N clips.
          geometry: pixels ↔ tokens.
          rows: the `rows` part of a config.
          seed: of the order.
          text: [N] text tokens of each caption before it is cut; None: its bytes after a begin token.
          pad: text tokens that every caption takes, `config.text.pad`; 0: those that it has.

        Raises:
          ConfigError: a row too small for its caption, or no clip that fits into a row.
        """
        for key in ("count", "tokens", "segments", "text", "caption", "window"):
            if rows[key] < 1:
                raise ConfigError(f"config.rows.{key}={rows[key]}: expected at least 1")
        if rows.caption > rows.text:
            raise ConfigError(
                f"config.rows.caption={rows.caption} is more than config.rows.text={rows.text}: a caption must fit"
                f" into its row; set config.rows.text={rows.caption} or more"
            )
        self._seed = seed
        self._count = rows.count
        self._capacity = (rows.tokens, rows.text, rows.segments)
        text = np.asarray(sizes.text, np.int64) + 1 if text is None else text
        self._fit(sizes, geometry, rows, text)
        if pad:
            self._text = np.full_like(self._text, pad)
        self._group()
        self._pack(rows.window)
        self.step = functools.lru_cache(maxsize=64)(self._step)

    def _fit(self, sizes: ClipSizes, geometry: Geometry, rows: ConfigDict, text: np.ndarray) -> None:
        """What each clip needs of a row, and which ones have no place."""
        stored = [np.asarray(column, np.int64) for column in (sizes.frames, sizes.height, sizes.width)]
        sized = np.minimum.reduce(stored, initial=np.iinfo(np.int64).max) > 0
        frames, height, width = geometry.fit(*(np.where(sized, column, 1) for column in stored))
        t, y, x = geometry.grid(frames, height, width)
        area = y * x
        whole = (t * area > 0) & (frames > 0)
        longest = rows.tokens // np.maximum(area, 1)
        usable = sized & whole & (longest > 0)
        reasons = {NO_SIZE: ~sized, TOO_SMALL: sized & ~whole, TOO_LARGE: sized & whole & (longest == 0)}
        cropped = usable & (t > longest)
        t = np.minimum(t, longest)
        frames = np.where(cropped, (t * geometry.patch[0] - 1) * geometry.stride[0] + 1, frames)

        self.refused = {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
        self.cropped = int(cropped.sum())
        self.captions_cut = int((usable & (text > rows.caption)).sum())
        self._fitted = np.stack([frames, height, width], axis=1).astype(np.int32)
        self._tokens = t * area
        self._text = np.minimum(text, rows.caption)
        self._usable = np.flatnonzero(usable)
        if not len(self._usable):
            why = ", ".join(f"{count} {reason}" for reason, count in self.refused.items()) or "the index is empty"
            raise ConfigError(f"no clip fits into a row of config.rows.tokens={rows.tokens} tokens: {why}")

    @property
    def sizes(self) -> np.ndarray:
        return np.unique(self._fitted[self._usable], axis=0)

    def _group(self) -> None:
        """Sorts clips by need; `rank` = place in that order, where a clip stands once for each pass."""
        tokens, text = self._tokens[self._usable], self._coarse_text()
        need = tokens * (text.max() + 1) + text
        order = np.argsort(-need, kind="stable")
        self._order, tokens, text, need = self._usable[order], tokens[order], text[order], need[order]
        rows = _rows_needed(tokens, text, self._capacity)
        self.passes = int(np.ceil(MIN_STEPS * self._count / rows))
        whole = -(-self.passes // self._count) * self._count  # passes that cut every need into whole groups
        if self.passes > 1 and whole * len(order) <= MAX_PLACES:
            self.passes = whole

        starts = np.flatnonzero(np.diff(need, prepend=-1))
        self._class_start = starts * self.passes
        self._class_size = np.diff(starts, append=len(order)) * self.passes
        self._ranks = len(order) * self.passes
        pad = -self._ranks % self._count
        tokens, text = (np.pad(np.repeat(v, self.passes), (0, pad)).reshape(-1, self._count) for v in (tokens, text))
        self._group_needs = np.stack([tokens[:, 0], text.max(axis=1)], axis=1)

    def _coarse_text(self) -> np.ndarray:
        """Text needs rounded up as coarsely as costs no rows: the fewer needs there are, the freer the shuffle."""
        text = self._text[self._usable]
        sample = permute(np.arange(min(len(text), 2048)), len(text), self._seed, 0)
        tokens = self._tokens[self._usable][sample]

        def rows(text: np.ndarray) -> int:
            order = np.lexsort((-text, -tokens))
            return pack_bins(tokens[order], text[order], self._capacity).max() + 1

        coarse = [
            np.full_like(text, text.max()),
            *(np.minimum(_round_up(text, n), self._capacity[1]) for n in (1, 2, 4, 8)),
        ]
        exact = rows(text[sample])
        return next((c for c in coarse if rows(c[sample]) <= 1.005 * exact), text)

    def _pack(self, window: int) -> None:
        """Packs groups into steps, a window of groups at a time."""
        needs = self._group_needs
        groups = len(needs)
        steps = _rows_needed(*needs.T, self._capacity)
        windows = int(max(1, min(self._ranks // window, steps // MIN_STEPS)))
        shuffled = permute(np.arange(groups), groups, self._seed, 1)
        step_of = np.empty(groups, np.int64)
        first = 0
        for part in np.array_split(shuffled, windows):
            part = np.sort(part)  # by need, decreasingly, as all groups are
            step_of[part] = first + pack_bins(*needs[part].T, self._capacity)
            first = step_of[part].max() + 1
        self.steps_per_epoch = int(first)
        self._groups = np.argsort(step_of, kind="stable")
        self._groups_start = np.searchsorted(step_of[self._groups], np.arange(first + 1))

    def _step(self, step: int) -> tuple[Row, ...]:
        """The B rows of a step, from 0 and without end; a row may be empty."""
        epoch, place = divmod(step, self.steps_per_epoch)
        this = permute(place, self.steps_per_epoch, self._seed, 2, epoch)
        groups = self._groups[self._groups_start[this] : self._groups_start[this + 1]]
        # ranks [groups, B], each group dealt to the rows in an order of its own.
        deal = np.argsort(mix(self._seed, 3, epoch, groups[:, None], np.arange(self._count)), axis=1)
        ranks = groups[:, None] * self._count + deal
        real = ranks < self._ranks
        classes = np.searchsorted(self._class_start, ranks, side="right") - 1
        start, size = self._class_start[classes], self._class_size[classes]
        drawn = start + permute(np.where(real, ranks - start, 0), size, self._seed, 4, epoch, classes)
        clips = self._order[drawn // self.passes]
        epochs = epoch * self.passes + drawn % self.passes

        tokens, text = np.where(real, self._tokens[clips], 0), np.where(real, self._text[clips], 0)
        columns = (
            clips,
            epochs,
            *np.moveaxis(self._fitted[clips], -1, 0),
            np.cumsum(tokens, axis=0) - tokens,
            tokens,
            np.cumsum(text, axis=0) - text,
            text,
            np.cumsum(real, axis=0),
        )
        table = np.stack(columns, axis=-1)  # [groups, B, fields of Placed]
        return tuple(
            tuple(Placed(*fields) for fields in table[:, row][real[:, row]].tolist()) for row in range(self._count)
        )

    def stats(self, steps: Iterable[int]) -> PackingStats:
        """Measures the given steps."""
        rows = [self._step(step) for step in steps]
        row_tokens, row_text, _ = self._capacity
        total = len(rows) * self._count
        flat = [row for step in rows for row in step]
        spreads = []
        for step in rows:
            flops = [sum(p.tokens**2 for p in row) for row in step if row]
            spreads.append(max(flops) / min(flops) - 1)
        return PackingStats(
            fill=sum(p.tokens for row in flat for p in row) / (total * row_tokens),
            text_fill=sum(p.text for row in flat for p in row) / (total * row_text),
            flops_spread_mean=float(np.mean(spreads)),
            flops_spread_max=float(np.max(spreads)),
            balanced=float(np.mean(np.array(spreads) <= 0.1)),
            clips_per_row=sum(map(len, flat)) / total,
            empty_rows=sum(not row for row in flat),
            cropped=self.cropped,
            refused=dict(self.refused),
            captions_cut=self.captions_cut,
        )


def _round_up(values: np.ndarray, per_octave: int) -> np.ndarray:
    """Integers ≥ 1 rounded up so that only `per_octave` values are left between powers of two."""
    _, exponent = np.frexp(np.maximum(values - 1, 0))  # 2^(exponent-1) < value ≤ 2^exponent
    unit = np.maximum((1 << np.maximum(exponent.astype(np.int64) - 1, 0)) // per_octave, 1)
    return -(-values // unit) * unit


def _rows_needed(tokens: np.ndarray, text: np.ndarray, capacity: tuple[int, int, int]) -> float:
    """Rows that items need at the least, by the scarcest capacity."""
    needs = (tokens.sum(), text.sum(), len(tokens))
    return max(float(need) / have for need, have in zip(needs, capacity, strict=True))


def pack_bins(tokens: np.ndarray, text: np.ndarray, capacity: tuple[int, int, int]) -> np.ndarray:
    """Packs items into as few bins as two heuristics find; arguments and result as of `best_fit`.

    Best fit leaves bins of small items alone, which text or segments fill before tokens do. Where it shows, worst fit
    into a given number of bins spreads them over all rows instead; the number is found by bisection.
    """
    best = best_fit(tokens, text, capacity)
    few, many = int(np.ceil(_rows_needed(tokens, text, capacity))) - 1, int(best.max()) + 1  # too few, enough
    while many - few > max(1, many // 400):
        middle = (few + many) // 2
        found = worst_fit(tokens, text, capacity, middle)
        if found is None:
            few = middle
        else:
            best, many = found, middle
    return best


def worst_fit(tokens: np.ndarray, text: np.ndarray, capacity: tuple[int, int, int], bins: int) -> np.ndarray | None:
    """Each item goes to the emptiest of `bins` bins that has room for it; None where one has none.

    Arguments and result otherwise as of `best_fit`.
    """
    row_tokens, row_text, row_items = capacity
    left = [(-row_tokens, b) for b in range(bins)]  # a heap: the most tokens left first
    left_text, left_items = [row_text] * bins, [row_items] * bins
    least = int(text.min())
    placed = []
    for need, need_text in zip(tokens.tolist(), text.tolist(), strict=True):
        passed = []
        while left and -left[0][0] >= need and left_text[left[0][1]] < need_text:
            passed.append(heapq.heappop(left))
        if not left or -left[0][0] < need:
            return None
        room, b = left[0]
        left_text[b] -= need_text
        left_items[b] -= 1
        if left_items[b] and left_text[b] >= least:
            heapq.heapreplace(left, (room + need, b))
        else:
            heapq.heappop(left)
        for entry in passed:
            heapq.heappush(left, entry)
        placed.append(b)
    return np.asarray(placed)


def best_fit(tokens: np.ndarray, text: np.ndarray, capacity: tuple[int, int, int]) -> np.ndarray:
    """Best-fit decreasing under three capacities: each item goes to the fullest bin that has room for it.

    Args:
      tokens, text: [n] what each item needs, sorted decreasingly; a run of equal items is placed at once.
      capacity: tokens, text and items a bin.

    Returns:
      [n] the bin of each item; bins are counted from 0 without gaps.
    """
    n = len(tokens)
    bins = np.empty(n, np.int64)
    left = np.tile(np.asarray(capacity, np.int64), (n, 1))  # of every bin that may be opened
    opened = 0
    runs = np.flatnonzero((np.diff(tokens, prepend=-1) != 0) | (np.diff(text, prepend=-1) != 0))
    for start, stop in zip(runs, np.append(runs[1:], n), strict=True):
        need = np.array([max(tokens[start], 1), max(text[start], 1), 1])
        new = -(-(stop - start) // (np.asarray(capacity) // need).min())  # bins that the run takes at most
        room = (left[: opened + new] // need).min(axis=1)
        fits = np.flatnonzero(room)
        fits = fits[np.argsort(left[fits, 0], kind="stable")]
        taken = np.diff(np.minimum(np.cumsum(room[fits]), stop - start), prepend=0)
        left[fits] -= taken[:, None] * need
        bins[start:stop] = np.repeat(fits, taken)
        opened = max(opened, int(fits[taken > 0].max()) + 1)
    return bins
