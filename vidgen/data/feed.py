"""Reads clips into rows and hands them to the devices ahead of the step.

Grain reads and decodes rows in threads; one more thread stacks them into batches and starts their way to the devices.
A batch is a pure function of its step, so a feed starts anywhere and nothing of it is saved.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip
from vidgen.data.latents import CachedClips, notes
from vidgen.data.order import mix
from vidgen.data.packing import Packing, Placed, Row
from vidgen.data.sources import Source
from vidgen.data.text import encode_text
from vidgen.parallel.mesh import ROWS, batch_shardings, check_fit

if TYPE_CHECKING:  # a room above, of which only this shape is known here
    from vidgen.tokenizers.base import Tokenizer


AHEAD = 2  # batches on their way to the devices while a step runs


@dataclasses.dataclass(frozen=True)
class FeedInfo:
    """What a batch says of its making, on this host.

    Where the devices of several hosts share a row, each of them reads it, and one of them counts its bad clips.

    Attributes:
      wait: seconds that the step waited for it.
      bad: reason → how many of its clips are padding because of it.
      bad_clips: (name, reason) of each of them.
    """

    wait: float
    bad: dict[str, int]
    bad_clips: tuple[tuple[str, str], ...] = ()


BadClips = list[tuple[int, str]]  # (index, reason)


def host_rows(
    source: Source | CachedClips,
    packing: Packing,
    tokenizer: Tokenizer,
    config: ConfigDict,
    step: int,
    rows: slice | Sequence[int] = slice(None),
) -> TokenBatch:
    """The chosen rows of a step: what a run's feed puts onto the devices, as NumPy arrays.

    Args:
      source: of the clips that `packing` planned with, or a cache of their latents.
      packing: which clip stands where.
      tokenizer: clips → what the feed carries of their tokens.
      config: of the run.
      step: from 0.
      rows: which of the B rows.

    Returns:
      A TokenBatch of the b chosen rows: tokens [b,S,D] as `tokenizer.fed` says (u8 pixel blocks, or f32 moments of a
      VAE), context {"text": (ids, segment)}, clip i32.
      A clip that cannot be read is padding, and moves nothing.
    """
    plan = packing.step(step)
    chosen = plan[rows] if isinstance(rows, slice) else [plan[row] for row in rows]
    return _stack([build_row(source, row, tokenizer, config)[0] for row in chosen])


def build_row(
    source: Source | CachedClips, row: Row, tokenizer: Tokenizer, config: ConfigDict
) -> tuple[TokenBatch, BadClips]:
    """One row, without the batch axis, and the clips of it that could not be read."""
    rows, (features, dtype) = config.rows, tokenizer.fed
    tokens = np.zeros((rows.tokens, features), dtype)
    coords = np.zeros((rows.tokens, 3), np.float32)
    segment = np.zeros(rows.tokens, np.int32)
    clips = np.full(rows.segments, -1, np.int32)
    text, text_segment = np.zeros((2, rows.text), np.int32)
    bad = []
    for placed in row:
        try:
            own, caption, fps = _read(source, placed, tokenizer, config.seed)
        except BadClip as error:
            bad.append((placed.clip, str(error)))
            continue
        except Exception as error:
            raise ConfigError(
                f"reading clip {source.name(placed.clip)} (index {placed.clip}, pass {placed.epoch}) failed:"
                f" {type(error).__name__}: {error}"
            ) from error
        where = slice(placed.token_start, placed.token_start + placed.tokens)
        tokens[where] = own
        size = (placed.frames, placed.height, placed.width)
        coords[where] = tokenizer.geometry.coords(*size, fps if config.model.time_in_seconds else None)
        segment[where] = placed.segment
        clips[placed.segment - 1] = placed.clip
        ids = encode_text(caption, placed.text)
        where = slice(placed.text_start, placed.text_start + len(ids))
        text[where], text_segment[where] = ids, placed.segment
    context = {"text": (text, text_segment)}
    return TokenBatch(tokens, coords, segment, level=segment, context=context, clip=clips), bad


def batch_like(config: ConfigDict, tokenizer: Tokenizer) -> TokenBatch:
    """The shapes and types of a batch of the feed: a TokenBatch of ShapeDtypeStructs."""
    r, (features, dtype) = config.rows, tokenizer.fed

    def of(*shape: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((r.count, *shape), dtype)

    return TokenBatch(
        tokens=of(r.tokens, features, dtype=dtype),
        coords=of(r.tokens, 3, dtype=np.float32),
        segment=of(r.tokens),
        level=of(r.tokens),
        context={"text": (of(r.text), of(r.text))},
        clip=of(r.segments),
    )


def _read(
    source: Source | CachedClips, placed: Placed, tokenizer: Tokenizer, seed: int
) -> tuple[np.ndarray, str, float]:
    """(tokens [n,D], caption, fps) of a clip in its place: encoded here, or in the cache already."""
    if isinstance(source, CachedClips):
        clip = source.read(placed.clip, placed.epoch)
        t, y, x = tokenizer.geometry.latent_grid(placed.frames, placed.height, placed.width)
        if len(clip.moments) < t or clip.moments.shape[1:] != (y, x, 2 * tokenizer.geometry.channels):
            raise BadClip("size differs from the index")
        return tokenizer.fill_moments(clip.moments[:t]), clip.caption, clip.fps
    clip = read_clip(source, placed.clip, placed.epoch)
    start = 0
    if not tokenizer.learned:  # in time a stretch that each pass draws anew
        room = len(clip.video) - placed.frames
        start = int(mix(seed, 5, placed.epoch, placed.clip) % np.uint64(room + 1))
    video = cut(clip.video, start, placed.frames, placed.height, placed.width)
    return tokenizer.fill(video), clip.caption, clip.fps


def read_clip(source: Source, index: int, epoch: int) -> Clip:
    """A clip of the source, if it is what the index says; raises BadClip."""
    clip, sizes = source.read(index, epoch), source.sizes
    size = (sizes.frames[index], sizes.height[index], sizes.width[index], 3)
    if clip.video.shape != size or clip.video.dtype != np.uint8:
        raise BadClip("size differs from the index")
    if len(clip.caption.encode("utf-8", errors="replace")) > sizes.text[index]:
        raise BadClip("caption is longer than the index says")
    return clip


def cut(video: np.ndarray, start: int, frames: int, height: int, width: int) -> np.ndarray:
    """So many frames of a clip [T,H,W,3], of each the middle."""
    y, x = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return video[start : start + frames, y : y + height, x : x + width]


def _stack(rows: Sequence[TokenBatch]) -> TokenBatch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def batches(
    source: Source | CachedClips,
    packing: Packing,
    tokenizer: Tokenizer,
    config: ConfigDict,
    start_step: int,
    mesh: Mesh,
) -> Batches:
    """The batches of steps start_step, start_step + 1, … without end, each on the devices before it is asked for.

    A host reads the rows that its devices hold any part of, and no others. Where the context axis runs over several
    hosts, they share rows, and each of them reads and decodes the whole row. A VAE encodes on the first device of each.

    Args:
      source, packing, tokenizer, config: as for `host_rows`.
      start_step: the first step.
      mesh: on which the batches lie by `mesh.batch_shardings`: rows over data and fsdp, tokens over context.

    Returns:
      An iterator of (TokenBatch of global arrays, FeedInfo). Close it, use it in a `with`, or drop it: its threads end.

    Raises:
      ConfigError: rows or tokens that the devices can't share equally; what `latents.notes` raises.
    """
    return Batches(source, packing, tokenizer, config, start_step, mesh)


class Batches(Iterator[tuple[TokenBatch, FeedInfo]]):
    """Iterator over (TokenBatch, FeedInfo) with threads behind it; made by `batches`."""

    def __init__(
        self,
        source: Source | CachedClips,
        packing: Packing,
        tokenizer: Tokenizer,
        config: ConfigDict,
        start_step: int,
        mesh: Mesh,
    ):
        notes(source, packing, tokenizer, config)
        check_fit(dict(mesh.shape), config.rows.count, config.rows.tokens)
        local = local_rows(mesh, config.rows.count)
        rows = _grain_rows(source, packing, tokenizer, config, start_step, local)
        self._queue: queue.Queue = queue.Queue(AHEAD)
        stop = threading.Event()
        place = Placement(mesh, config, tokenizer)
        # The thread knows nothing of this object, so that dropping the object ends the thread.
        thread = threading.Thread(
            target=_work, args=(rows, place, source, self._queue, stop), name="vidgen-feed", daemon=True
        )
        self._error: BaseException | None = None
        self.close = weakref.finalize(self, _close, self._queue, stop, thread)  # also when the interpreter exits
        thread.start()

    def __next__(self) -> tuple[TokenBatch, FeedInfo]:
        if self._error is not None:
            raise self._error
        if not self.close.alive:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, info = item
        return batch, dataclasses.replace(info, wait=time.perf_counter() - start)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of a step's rows this host's devices hold any part of, in order."""
    held = NamedSharding(mesh, ROWS).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in held]))


def counted_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Those of `local_rows` that this host answers for, where it shares them: each row has one such host."""
    owner = np.full(count, jax.process_count())
    for device, index in NamedSharding(mesh, ROWS).devices_indices_map((count,)).items():
        owner[index] = np.minimum(owner[index], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def _grain_rows(
    source: Source | CachedClips,
    packing: Packing,
    tokenizer: Tokenizer,
    config: ConfigDict,
    start_step: int,
    local: np.ndarray,
) -> grain.DatasetIterator:
    """Rows of this host one after the other, each (row, bad clips) or the exception that it ended in."""

    def row(index: int):
        # Whatever is raised inside Grain costs the records around it, so exceptions travel as values.
        try:
            step, place = start_step + index // len(local), local[index % len(local)]
            return build_row(source, packing.step(step)[place], tokenizer, config)
        except Exception as error:
            return error

    for key in ("threads", "prefetch"):
        if config.data[key] < 0:
            raise ConfigError(f"config.data.{key}={config.data[key]}: expected 0 or more")
    threads = config.data.threads
    ahead = max(config.data.prefetch * len(local), threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    rows = grain.MapDataset.range(sys.maxsize // 2).map(row)
    return iter(rows.to_iter_dataset(options))


class Placement:
    """This host's rows → global arrays on the mesh.

    Attributes:
      local: which of a step's rows it is to be given, in this order.
      counted: those of them that this host answers for.
    """

    def __init__(self, mesh: Mesh, config: ConfigDict, tokenizer: Tokenizer):
        self.local, self.counted = local_rows(mesh, config.rows.count), counted_rows(mesh, config.rows.count)
        self._like = batch_like(config, tokenizer)
        self._shardings = batch_shardings(mesh, self._like)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """[b,…] NumPy arrays of the local rows → [B,…] global ones."""

        def put(leaf: np.ndarray, like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
            def piece(index: tuple[slice, ...]) -> np.ndarray:
                first, stop, _ = index[0].indices(like.shape[0])
                return leaf[(slice(*np.searchsorted(self.local, (first, stop))), *index[1:])]

            return jax.make_array_from_callback(like.shape, sharding, piece)

        return jax.tree.map(put, batch, self._like, self._shardings)


def _work(
    rows: grain.DatasetIterator, place: Placement, source: Source, out: queue.Queue, stop: threading.Event
) -> None:
    """Thread: rows → batches on the devices → `out`, until told to stop or something is raised."""
    logged: set[tuple[int, str]] = set()
    try:
        while not stop.is_set():
            built = []
            for row in itertools.islice(rows, len(place.local)):
                if isinstance(row, Exception):
                    raise row
                if stop.is_set():
                    return
                built.append(row)
            bad = [(clip, reason) for _, row_bad in built for clip, reason in row_bad]
            for clip, reason in bad:
                if (clip, reason) not in logged:
                    logging.warning("clip %s (index %d) is left out: %s", source.name(clip), clip, reason)
                    logged.add((clip, reason))
            answered = [
                (source.name(clip), reason)
                for row, (_, row_bad) in zip(place.local, built, strict=True)
                if row in place.counted
                for clip, reason in row_bad
            ]
            info = FeedInfo(0.0, dict(Counter(reason for _, reason in answered)), tuple(answered))
            _put(out, (place(_stack([row for row, _ in built])), info), stop)
    except BaseException as error:
        _put(out, error, stop)
    finally:
        rows.close()


def _put(out: queue.Queue, item, stop: threading.Event) -> None:
    """`out.put`, given up when told to stop."""
    while not stop.is_set():
        try:
            return out.put(item, timeout=0.2)
        except queue.Full:
            pass


def _close(out: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while True:  # lets go of the batches that wait
        try:
            out.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(timeout=10)
