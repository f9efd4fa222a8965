"""Reads clips into rows and hands them to the devices ahead of the step.

Grain reads and decodes rows in threads; one more thread stacks them into batches and starts their way to the devices.
A batch is a pure function of its step, so a feed starts anywhere and nothing of it is saved.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen import passing
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip
from vidgen.data.hosts import BadClips, Unreadable, counted_rows, local_rows, placed
from vidgen.data.latents import CachedClips, notes
from vidgen.data.order import mix
from vidgen.data.packing import Packing, Placed, Row
from vidgen.data.sources import Source
from vidgen.data.stream import Item, Stream
from vidgen.data.text import caption_lengths, encode_text
from vidgen.parallel.mesh import batch_shardings, check_fit

if TYPE_CHECKING:  # rooms above, of which only these shapes are known here
    from vidgen.text.frozen import FrozenEncoder
    from vidgen.tokenizers.base import Tokenizer


def plan(
    source: Source | CachedClips, tokenizer: Tokenizer, config: ConfigDict, text: FrozenEncoder | None = None
) -> Packing:
    """Which clip of the source stands where in a run; raises ConfigError as `Packing` does.

    `text`: the frozen encoder of the captions; None where text is bytes.
    """
    lengths = caption_lengths(source, text, config.rows.caption)
    pad = text.pad if text else 0
    return Packing(source.sizes, tokenizer.geometry, config.rows, config.seed, lengths, pad)


def host_rows(
    source: Source | CachedClips,
    packing: Packing,
    tokenizer: Tokenizer,
    config: ConfigDict,
    step: int,
    rows: slice | Sequence[int] = slice(None),
    text: FrozenEncoder | None = None,
) -> TokenBatch:
    """The chosen rows of a step: what a run's feed puts onto the devices, as NumPy arrays.

    Args:
      source: of the clips that `packing` planned with, or a cache of their latents.
      packing: which clip stands where.
      tokenizer: clips → what the feed carries of their tokens.
      config: of the run.
      step: from 0.
      rows: which of the B rows.
      text: the frozen encoder of the captions; None where text is bytes.

    Returns:
      A TokenBatch of the b chosen rows: tokens [b,S,D] as `tokenizer.fed` says (u8 pixel blocks, or f32 moments of a
      VAE), clip i32, and the context of `build_row`.
      A clip that cannot be read is padding, and moves nothing.
    """
    plan = packing.step(step)
    chosen = plan[rows] if isinstance(rows, slice) else [plan[row] for row in rows]
    return _stack([build_row(source, row, tokenizer, config, text)[0] for row in chosen])


def build_row(
    source: Source | CachedClips,
    row: Row,
    tokenizer: Tokenizer,
    config: ConfigDict,
    text: FrozenEncoder | None = None,
) -> tuple[TokenBatch, BadClips]:
    """One row, without the batch axis, and the clips of it that could not be read.

    Its context is {"text": (ids [L] i32, segment [L])} of bytes. Of a frozen encoder it is {"text": (values [L,E] f32,
    segment [L]), "empty": (values [1,E] f32, segment [1])}: with `text.pad` a caption's segment goes on over the zeros
    behind it, and "empty" is what a dropped caption becomes, of no segment, so that nobody attends to it there.
    """
    rows, (features, dtype) = config.rows, tokenizer.fed
    tokens = np.zeros((rows.tokens, features), dtype)
    coords = np.zeros((rows.tokens, 3), np.float32)
    segment = np.zeros(rows.tokens, np.int32)
    clips = np.full(rows.segments, -1, np.int32)
    captions = np.zeros((rows.text, text.width), np.float32) if text else np.zeros(rows.text, np.int32)
    text_segment = np.zeros(rows.text, np.int32)
    found, bad = _read_row(source, row, tokenizer, config, text)
    for place, (own, caption, fps) in found:
        where = slice(place.token_start, place.token_start + place.tokens)
        tokens[where] = own
        size = (place.frames, place.height, place.width)
        coords[where] = tokenizer.geometry.coords(*size, fps if config.model.time_in_seconds else None)
        segment[where] = place.segment
        clips[place.segment - 1] = place.clip
        where = slice(place.text_start, place.text_start + len(caption))
        captions[where], text_segment[where] = caption, place.segment
    context = {"text": (captions, text_segment)}
    if text:
        empty = source.empty if isinstance(source, CachedClips) else text.empty
        context["empty"] = (empty, np.zeros(1, np.int32))
    return TokenBatch(tokens, coords, segment, level=segment, context=context, clip=clips), bad


def _read_row(
    source: Source | CachedClips, row: Row, tokenizer: Tokenizer, config: ConfigDict, text: FrozenEncoder | None
) -> tuple[list[tuple[Placed, tuple[np.ndarray, np.ndarray, float]]], BadClips]:
    """([(place, (tokens [n,D], ids or values of the caption, fps))], bad clips): the captions encoded together."""
    read, bad = [], []
    for place in row:
        try:
            read.append((place, _read(source, place, tokenizer, config.seed)))
        except BadClip as error:
            bad.append((place.clip, str(error)))
    if text is None:
        return [(place, (own, encode_text(said, place.text), fps)) for place, (own, said, fps) in read], bad
    online = [said for _, (_, said, _) in read if isinstance(said, str)]
    values = iter(text.encode(online) if online else ())
    found = []
    for place, (own, said, fps) in read:
        said = text.place(next(values) if isinstance(said, str) else said)
        if len(said) > place.text:
            bad.append((place.clip, "caption is longer than the index says"))
        else:
            found.append((place, (own, said, fps)))
    return found, bad


def batch_like(config: ConfigDict, tokenizer: Tokenizer, text: FrozenEncoder | None = None) -> TokenBatch:
    """The shapes and types of a batch of the feed: a TokenBatch of ShapeDtypeStructs.

    `text`: the frozen encoder of the captions, of which only the width is asked; None where text is bytes.
    """
    r, (features, dtype) = config.rows, tokenizer.fed

    def of(*shape: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((r.count, *shape), dtype)

    context = {"text": (of(r.text), of(r.text))}
    if text:
        values = (of(n, text.width, dtype=np.float32) for n in (r.text, 1))
        context = {name: (v, of(v.shape[1])) for name, v in zip(("text", "empty"), values, strict=True)}
    return TokenBatch(
        tokens=of(r.tokens, features, dtype=dtype),
        coords=of(r.tokens, 3, dtype=np.float32),
        segment=of(r.tokens),
        level=of(r.tokens),
        context=context,
        clip=of(r.segments),
    )


def _read(
    source: Source | CachedClips, place: Placed, tokenizer: Tokenizer, seed: int
) -> tuple[np.ndarray, str | np.ndarray, float]:
    """(tokens [n,D], caption or its values, fps) of a clip in its place: encoded here, or in the cache already."""
    if isinstance(source, CachedClips):
        clip = _asked(source, place.clip, place.epoch)
        t, y, x = tokenizer.geometry.latent_grid(place.frames, place.height, place.width)
        if len(clip.moments) < t or clip.moments.shape[1:] != (y, x, 2 * tokenizer.geometry.channels):
            raise BadClip("size differs from the index")
        said = clip.caption if clip.text is None else clip.text
        return tokenizer.fill_moments(clip.moments[:t]), said, clip.fps
    clip = read_clip(source, place.clip, place.epoch)
    start = 0
    if not tokenizer.learned:  # in time a stretch that each pass draws anew
        room = len(clip.video) - place.frames
        start = int(mix(seed, 5, place.epoch, place.clip) % np.uint64(room + 1))
    video = cut(clip.video, start, place.frames, place.height, place.width)
    return tokenizer.fill(video), clip.caption, clip.fps


def read_clip(source: Source, index: int, epoch: int) -> Clip:
    """A clip of the source. Raises BadClip unless it is what the index says, ConfigError where the source fails."""
    clip, sizes = _asked(source, index, epoch), source.sizes
    size = (sizes.frames[index], sizes.height[index], sizes.width[index], 3)
    if clip.video.shape != size or clip.video.dtype != np.uint8:
        raise BadClip("size differs from the index")
    if len(clip.caption.encode("utf-8", errors="replace")) > sizes.text[index]:
        raise BadClip("caption is longer than the index says")
    return clip


def _asked(source: Source | CachedClips, index: int, epoch: int) -> Any:
    """What the source reads. A disk that is away for a moment is asked again, and one that is away for longer is no
    fault of the clip's; a place that the disk can't read, again and again, is.
    """
    try:
        return passing.again(lambda: source.read(index, epoch))
    except BadClip:
        raise
    except Exception as error:
        if passing.sector(error):
            raise BadClip("the disk can't read it") from error
        raise ConfigError(
            f"reading clip {source.name(index)} (index {index}, pass {epoch}) failed: {type(error).__name__}: {error}"
        ) from error


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
    text: FrozenEncoder | None = None,
) -> Stream:
    """The batches of steps start_step, start_step + 1, … without end, each on the devices before it is asked for.

    A host reads the rows that its devices hold any part of, and no others. Where the context axis runs over several
    hosts, they share rows, and each of them reads and decodes the whole row. A VAE and a text encoder work on the first
    device of each.

    Args:
      source, packing, tokenizer, config, text: as for `host_rows`.
      start_step: the first step.
      mesh: on which the batches lie by `mesh.batch_shardings`: rows over data and fsdp, tokens over context.

    Returns:
      An iterator of (TokenBatch of global arrays, FeedInfo). Close it, use it in a `with`, or drop it: its threads end.

    Raises:
      ConfigError: rows or tokens that the devices can't share equally; what `latents.notes` raises, and a text encoder
        whose weights or tokenizer can't be used.
    """
    notes(source, packing, tokenizer, config, text)
    if text and not isinstance(source, CachedClips):
        _ = text.empty  # what is wrong with it shows here, not in a thread
    check_fit(dict(mesh.shape), config.rows.count, config.rows.tokens)
    place = Placement(mesh, config, tokenizer, text)
    rows = _grain_rows(source, packing, tokenizer, config, start_step, place.local, text)
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
    text: FrozenEncoder | None,
) -> grain.DatasetIterator:
    """Rows of this host one after the other, each (row, bad clips) or the exception that it ended in."""

    def row(index: int):
        # Whatever is raised inside Grain costs the records around it, so exceptions travel as values.
        try:
            step, place = start_step + index // len(local), local[index % len(local)]
            return build_row(source, packing.step(step)[place], tokenizer, config, text)
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

    def __init__(self, mesh: Mesh, config: ConfigDict, tokenizer: Tokenizer, text: FrozenEncoder | None = None):
        self.local, self._count = local_rows(mesh, config.rows.count), config.rows.count
        self._shardings = batch_shardings(mesh, batch_like(config, tokenizer, text))

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """[b,…] NumPy arrays of the local rows → [B,…] global ones."""
        return jax.tree.map(lambda leaf, s: placed(leaf, self.local, self._count, s), batch, self._shardings)
