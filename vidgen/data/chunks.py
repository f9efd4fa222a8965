"""What a VAE learns from: chunks of one size a step, cut out of clips that are at least as large.

A clip counts as large as whole latents make it: where its size is no multiple of theirs, its last frame, row and
column stand several times, as they do when it is encoded, so that a VAE knows such edges.

Which chunk stands where follows from (seed, step, slot) and the index of clip sizes by arithmetic, as rows of tokens do
in `packing.py`, so that a run resumes anywhere, on any mesh, and nothing is saved.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.batch import VideoBatch
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, ClipSizes
from vidgen.data.feed import read_clip
from vidgen.data.hosts import BadClips, Unreadable, counted_rows, local_rows, placed
from vidgen.data.order import mix, permute
from vidgen.data.sources import Source
from vidgen.data.stream import Item, Stream
from vidgen.geometry import Geometry, Grid
from vidgen.parallel.mesh import ROW_AXES, ROWS

CYCLE = 256  # steps in which each shape comes as often as its weight says
VIDEO = P(ROW_AXES, None, "context")  # chunks over data and fsdp, their height over context

_DEAL, _SHUFFLE, _CUT = 21, 22, 23  # what a random number is for


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a step's chunks.

    Attributes:
      frames, height, width: of each chunk, pixels.
      count: chunks a step, over all devices.
    """

    frames: int
    height: int
    width: int
    count: int

    @property
    def size(self) -> Grid:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def text(self) -> str:
        """Such as 17x64x64."""
        return "x".join(map(str, self.size))


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a chunk is cut: from clip `clip` of the index, as read in pass `epoch`, at (t, y, x) `start`."""

    clip: int
    epoch: int
    start: Grid


def shapes_of(c: ConfigDict, stride: Grid) -> tuple[Shape, ...]:
    """`config.clips.shapes`; raises ConfigError where they, the weights or the steps of images make no sense.

    Args:
      c: `config.clips`.
      stride: pixels that a latent of the VAE covers in (t, y, x): chunks are of 1 + k·t frames, and multiples of y, x.
    """
    if not c.shapes:
        raise ConfigError("config.clips.shapes is empty; expected (frames, height, width, chunks a step), some of them")
    for shape in c.shapes:
        if not isinstance(shape, tuple | list) or len(shape) != 4 or any(type(n) is not int or n < 1 for n in shape):
            raise ConfigError(
                f"config.clips.shapes: {shape!r}: expected (frames, height, width, chunks a step), whole numbers"
            )
        fits = Geometry(stride, (1, 1, 1), 1)
        size = tuple(shape[:3])
        if fits.fit(*size) != size:
            options = itertools.product(*zip(fits.fit(*size), fits.cover(*size), strict=True))
            near = min((o for o in options if min(o) > 0), key=lambda o: np.abs(np.subtract(o, size)).sum())
            raise ConfigError(
                f"config.clips.shapes: {'x'.join(map(str, size))}: the VAE wants 1 + {stride[0]}k frames, and height "
                f"and width multiples of {stride[1]} and {stride[2]}; nearest: {'x'.join(map(str, near))}"
            )
    weights = tuple(c.weights)
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    if weights and (
        not numbers or len(weights) != len(c.shapes) or not min(weights) >= 0 or not 0 < sum(weights) < 1e9
    ):
        raise ConfigError(
            f"config.clips.weights={weights}: expected {len(c.shapes)} numbers ≥ 0, one for each of clips.shapes, not "
            "all 0"
        )
    if c.image_steps and all(shape[0] > 1 for shape in c.shapes):
        raise ConfigError(
            f"config.clips.image_steps={c.image_steps}: none of clips.shapes has one frame; add such as (1, 64, 64, 16)"
        )
    return tuple(Shape(*shape) for shape in c.shapes)


def check_fit(shapes: Sequence[Shape], sizes: dict[str, int], parts: int = 1) -> None:
    """Raises ConfigError unless the chunks of each microbatch, and their height, divide over a mesh of these sizes."""
    over = parts
    for axis in ROW_AXES:
        over *= sizes[axis]
    for shape in shapes:
        if shape.count % over:
            raise ConfigError(
                f"config.clips.shapes: {shape.count} chunks of {shape.text} don't divide over {over // parts} devices "
                f"(data x fsdp) in {parts} parts (config.optimizer.accumulate); nearest: "
                f"{max(1, round(shape.count / over)) * over}"
            )
        if shape.height % sizes["context"]:
            raise ConfigError(
                f"config.clips.shapes: the height of {shape.text} doesn't divide over context={sizes['context']} "
                f"devices; nearest: {max(1, round(shape.height / sizes['context'])) * sizes['context']}"
            )


class Chunks:
    """Which chunks a step has. Each pass of a shape over the clips that are as large sees each of them once.

    Attributes:
      shapes: that a step may have.
      eligible: for each shape, the clips that are, in whole latents, at least as large, [n] i64.
      too_small: clips that are smaller than every shape, and stay out.
    """

    def __init__(self, sizes: ClipSizes, c: ConfigDict, shapes: Sequence[Shape], stride: Grid, seed: int):
        """Raises ConfigError if no clip is as large as one of the shapes.

        Args:
          sizes: of the clips.
          c: `config.clips`.
          shapes: of `shapes_of`.
          stride: of the VAE, as for `shapes_of`.
          seed: of all that is drawn.
        """
        self.shapes, self._seed = tuple(shapes), seed
        columns = Geometry(stride, (1, 1, 1), 1).cover(sizes.frames, sizes.height, sizes.width)
        self._covered = np.stack(columns, axis=-1)
        self.eligible = [np.flatnonzero((self._covered >= s.size).all(-1)) for s in shapes]
        for shape, clips in zip(shapes, self.eligible, strict=True):
            if not len(clips):
                most = "x".join(str(int(n)) for n in self._covered.max(axis=0))
                raise ConfigError(
                    f"config.clips.shapes: none of the {len(sizes)} clips is as large as {shape.text}; they are "
                    f"{most} at most (frames, height, width, each on its own, in whole latents); take a smaller shape"
                )
        used = np.zeros(len(sizes), bool)
        for clips in self.eligible:
            used[clips] = True
        self.too_small = int((~used).sum())
        weights = np.asarray(c.weights or [1.0] * len(shapes), np.float64)
        images = np.asarray([s.frames == 1 for s in shapes])
        early = np.where(images, weights, 0.0) if (weights * images).any() else images.astype(np.float64)
        self._images = c.image_steps
        self._phases = tuple(_deal(w) if w.any() else None for w in (early, weights))
        self._cycle = functools.lru_cache(maxsize=16)(self._dealt)

    def _place(self, step: int) -> tuple[int, int]:
        """(phase, steps of it before this one)."""
        return (0, step) if step < self._images else (1, step - self._images)

    def _dealt(self, phase: int, number: int) -> np.ndarray:
        """Which shape each step of a cycle has, [CYCLE]."""
        return self._phases[phase][permute(np.arange(CYCLE), CYCLE, self._seed, _DEAL, phase, number)]

    def index(self, step: int) -> int:
        """Which of `shapes` a step, from 0, has."""
        phase, n = self._place(step)
        return int(self._cycle(phase, n // CYCLE)[n % CYCLE])

    def shape(self, step: int) -> Shape:
        """The size of a step's chunks."""
        return self.shapes[self.index(step)]

    def _before(self, step: int, index: int) -> int:
        """How many earlier steps had the shape."""
        phase, n = self._place(step)
        cycles, rest = divmod(n, CYCLE)
        count = cycles * int((self._phases[phase] == index).sum())
        count += int((self._cycle(phase, cycles)[:rest] == index).sum())
        if phase and self._images:  # those of the first phase: up to its last step, and that one
            count += self._before(self._images - 1, index) + (self.index(self._images - 1) == index)
        return count

    def step(self, step: int) -> list[Cut]:
        """The chunks of a step, from 0: `shape(step).count` of them."""
        index = self.index(step)
        shape, clips = self.shapes[index], self.eligible[index]
        places = self._before(step, index) * shape.count + np.arange(shape.count)
        epochs, orders = np.divmod(places, len(clips))
        chosen = clips[permute(orders, len(clips), self._seed, _SHUFFLE, index, epochs)]
        free = (self._covered[chosen] - shape.size).astype(np.uint64)
        starts = [
            (mix(self._seed, _CUT, index, places, axis) % (free[:, axis] + np.uint64(1))).astype(np.int64)
            for axis in range(3)
        ]
        return [
            Cut(int(clip), int(epoch), (int(t), int(y), int(x)))
            for clip, epoch, t, y, x in zip(chosen, epochs, *starts, strict=True)
        ]


def _deal(weights: np.ndarray) -> np.ndarray:
    """Shapes in proportion to their weights, [CYCLE], sorted; one of a weight above 0 comes at least once."""
    share = weights / weights.sum() * CYCLE
    counts = np.where(weights > 0, np.maximum(np.floor(share), 1), 0).astype(int)
    for i in np.argsort(counts - share)[: max(CYCLE - counts.sum(), 0)]:
        counts[i] += 1
    while counts.sum() > CYCLE:
        counts[counts.argmax()] -= 1
    return np.repeat(np.arange(len(weights)), counts)


def read_chunk(source: Source, cut: Cut, shape: Shape) -> tuple[np.ndarray, str]:
    """([T,H,W,3] u8, ""), or (black, why the clip could not be read); raises ConfigError as `read_clip` does.

    The chunk is a copy, so that one that waits for its step doesn't keep the whole clip in memory.
    """
    try:
        video = read_clip(source, cut.clip, cut.epoch).video
    except BadClip as error:
        return np.zeros((*shape.size, 3), np.uint8), str(error)
    # Beyond the clip's end, its last frame, row and column.
    inside = (
        np.minimum(np.arange(first, first + n), most - 1)
        for first, n, most in zip(cut.start, shape.size, video.shape[:3], strict=True)
    )
    return video[np.ix_(*inside)], ""


def host_chunks(
    source: Source, chunks: Chunks, step: int, rows: Sequence[int] | None = None
) -> tuple[VideoBatch, BadClips]:
    """(the chosen chunks of a step as NumPy arrays, (clip, reason) of those that could not be read).

    Args:
      source: of the clips that `chunks` was made of.
      step: from 0.
      rows: which of the step's chunks; None: all.
    """
    shape, plan = chunks.shape(step), chunks.step(step)
    cuts = plan if rows is None else [plan[row] for row in rows]
    batch, bad = _stack(cuts, [read_chunk(source, cut, shape) for cut in cuts])
    return batch, sum(bad, [])


def _stack(cuts: Sequence[Cut], read: Sequence[tuple[np.ndarray, str]]) -> tuple[VideoBatch, list[BadClips]]:
    """(batch, of each chunk its clip and the reason if it could not be read)."""
    clips = [-1 if reason else cut.clip for cut, (_, reason) in zip(cuts, read, strict=True)]
    bad = [[(cut.clip, reason)] if reason else [] for cut, (_, reason) in zip(cuts, read, strict=True)]
    return VideoBatch(np.stack([video for video, _ in read]), np.asarray(clips, np.int32)), bad


def batch_like(shape: Shape) -> VideoBatch:
    """The shapes and types of a batch: a VideoBatch of ShapeDtypeStructs."""
    video = jax.ShapeDtypeStruct((shape.count, *shape.size, 3), np.uint8)
    return VideoBatch(video, jax.ShapeDtypeStruct((shape.count,), np.int32))


def batch_shardings(mesh: Mesh) -> VideoBatch:
    """A sharding for each array of a batch: chunks over data and fsdp, their height over context."""
    return VideoBatch(NamedSharding(mesh, VIDEO), NamedSharding(mesh, ROWS))


def place(batch: VideoBatch, rows: np.ndarray, count: int, mesh: Mesh) -> VideoBatch:
    """NumPy arrays of some of a step's `count` chunks, those that this host's devices hold → global arrays."""
    return jax.tree.map(lambda leaf, s: placed(leaf, rows, count, s), batch, batch_shardings(mesh))


def load(source: Source, chunks: Chunks, step: int, mesh: Mesh) -> VideoBatch:
    """The chunks of a step on the mesh, now."""
    count = chunks.shape(step).count
    rows = local_rows(mesh, count)
    return place(host_chunks(source, chunks, step, rows)[0], rows, count, mesh)


def batches(source: Source, chunks: Chunks, data: ConfigDict, start: int, mesh: Mesh) -> Stream:
    """The batches of steps start, start + 1, … without end, on the devices before they are asked for.

    A host reads the chunks that its devices hold any part of, in `config.data.threads` threads, and holds
    `config.data.prefetch` batches ready.

    Returns: an iterator of (VideoBatch of global arrays, FeedInfo); close it, or use it in a `with`.
    """
    return Stream(_batches(source, chunks, data, start, mesh))


def _batches(
    source: Source, chunks: Chunks, data: ConfigDict, start: int, mesh: Mesh
) -> Generator[Item | None, None, None]:
    rows = {s.count: (local_rows(mesh, s.count), counted_rows(mesh, s.count)) for s in chunks.shapes}
    unreadable = Unreadable(source)
    waiting: collections.deque = collections.deque()
    pool = ThreadPoolExecutor(max(1, data.threads), thread_name_prefix="vidgen-chunks")
    try:
        for step in itertools.count(start):
            shape, plan = chunks.shape(step), chunks.step(step)
            cuts = [plan[row] for row in rows[shape.count][0]]
            waiting.append((shape, cuts, [pool.submit(read_chunk, source, cut, shape) for cut in cuts]))
            if len(waiting) <= data.prefetch:
                continue
            shape, cuts, reads = waiting.popleft()
            local, counted = rows[shape.count]
            read = []
            for future in reads:
                read.append(future.result())
                yield None
            batch, bad = _stack(cuts, read)
            yield place(batch, local, shape.count, mesh), unreadable.info(local, bad, counted)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
