"""Reads clips into rows and hands them to the devices ahead of the step.

Grain reads and decodes rows in threads; one more thread stacks them into batches and starts their way to the devices.
A batch is a pure function of its step, so a feed starts anywhere and nothing of it is saved.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip
from vidgen.data.hosts import BadClips, Unreadable, counted_rows, local_rows, placed
from vidgen.data.latents import CachedClips, notes
from vidgen.data.order import mix
from vidgen.data.packing import Packing, Placed, Row
from vidgen.data.sources import Source
from vidgen.data.stream import Item, Stream
from vidgen.data.text import encode_text
from vidgen.parallel.mesh import batch_shardings, check_fit

if TYPE_CHECKING:  # a room above, of which only this shape is known here
    from vidgen.tokenizers.base import Tokenizer


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
    for place in row:
        try:
            own, caption, fps = _read(source, place, tokenizer, config.seed)
        except BadClip as error:
            bad.append((place.clip, str(error)))
            continue
        where = slice(place.token_start, place.token_start + place.tokens)
        tokens[where] = own
        size = (place.frames, place.height, place.width)
        coords[where] = tokenizer.geometry.coords(*size, fps if config.model.time_in_seconds else None)
        segment[where] = place.segment
        clips[place.segment - 1] = place.clip
        ids = encode_text(caption, place.text)
        where = slice(place.text_start, place.text_start + len(ids))
        text[where], text_segment[where] = ids, place.segment
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
    source: Source | CachedClips, place: Placed, tokenizer: Tokenizer, seed: int
) -> tuple[np.ndarray, str, float]:
    """(tokens [n,D], caption, fps) of a clip in its place: encoded here, or in the cache already."""
    if isinstance(source, CachedClips):
        clip = source.read(place.clip, place.epoch)
        t, y, x = tokenizer.geometry.latent_grid(place.frames, place.height, place.width)
        if len(clip.moments) < t or clip.moments.shape[1:] != (y, x, 2 * tokenizer.geometry.channels):
            raise BadClip("size differs from the index")
        return tokenizer.fill_moments(clip.moments[:t]), clip.caption, clip.fps
    clip = read_clip(source, place.clip, place.epoch)
    start = 0
    if not tokenizer.learned:  # in time a stretch that each pass draws anew
        room = len(clip.video) - place.frames
        start = int(mix(seed, 5, place.epoch, place.clip) % np.uint64(room + 1))
    video = cut(clip.video, start, place.frames, place.height, place.width)
    return tokenizer.fill(video), clip.caption, clip.fps


def read_clip(source: Source, index: int, epoch: int) -> Clip:
    """A clip of the source. Raises BadClip unless it is what the index says, ConfigError where the source fails."""
    try:
        clip, sizes = source.read(index, epoch), source.sizes
    except BadClip:
        raise
    except Exception as error:
        raise ConfigError(
            f"reading clip {source.name(index)} (index {index}, pass {epoch}) failed: {type(error).__name__}: {error}"
        ) from error
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
) -> Stream:
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
    notes(source, packing, tokenizer, config)
    check_fit(dict(mesh.shape), config.rows.count, config.rows.tokens)
    place = Placement(mesh, config, tokenizer)
    rows = _grain_rows(source, packing, tokenizer, config, start_step, place.local)
    return Stream(_batches(rows, place, source, counted_rows(mesh, config.rows.count)))


def _batches(
    rows: grain.DatasetIterator, place: Placement, source: Source | CachedClips, counted: np.ndarray
) -> Generator[Item | None, None, None]:
    """Rows of this host → (batch on the devices, what to say of it)."""
    unreadable = Unreadable(source)
    try:
        while True:
            built = []
            for row in itertools.islice(rows, len(place.local)):
                if isinstance(row, Exception):
                    raise row
                built.append(row)
                yield None
            info = unreadable.info(place.local, [bad for _, bad in built], counted)
            yield place(_stack([row for row, _ in built])), info
    finally:
        rows.close()


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
    """

    def __init__(self, mesh: Mesh, config: ConfigDict, tokenizer: Tokenizer):
        self.local, self._count = local_rows(mesh, config.rows.count), config.rows.count
        self._shardings = batch_shardings(mesh, batch_like(config, tokenizer))

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """[b,…] NumPy arrays of the local rows → [B,…] global ones."""
        return jax.tree.map(lambda leaf, s: placed(leaf, self.local, self._count, s), batch, self._shardings)
