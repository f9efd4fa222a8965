"""A cache of latents: clips as a VAE gave them, by random access, so that training runs no VAE.

A directory that `vidgen encode` made holds

    key.json                        what the latents depend on (see `key`), written first
    latents-000000.array_record …   a record a clip, each a safetensors file: mean and logvar [t,y,x,z] f32 as the VAE
                                    gave them, caption and fps; with a frozen text encoder also text [n,E] f32, as it
                                    gave it; readers ignore tensors that they don't know
    latents-000000.jsonl …          the index: a line a record, in order: clip, pass, name, size, fps, problem
    text.safetensors                with a frozen text encoder: empty [1,E] f32, the values of the empty prompt
    cache.json                      passes, records and bytes of each shard, clips that could not be used; written last

Values of captions are float32 like the latents, so that training from a cache is training online to the bit. With the
encoder over bytes, which trains with the denoiser, what is kept of the text is the caption.

Which clip stands in which shard follows from the index of sizes alone (`Layout`): passes one after the other, and
within a pass clips of one size side by side, since a VAE encodes them together. A shard stands there whole or not at
all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, ClipSizes
from vidgen.data.packing import Packing
from vidgen.data.sources import Source, open_source
from vidgen.geometry import Geometry
from vidgen.passing import passes

KEY, CACHE, TEXT = "key.json", "cache.json", "text.safetensors"
FORMAT = 1  # of records and layout, and of the code that decides their values: one more whenever they change
CUT = "the first frames, the middle of the picture"  # what of a clip is encoded, down to whole tokens
SHARD_BYTES = (4 * 2**20, 2**30)  # least and most; between them, a thousandth of a pass. A kill costs one


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """A clip as a VAE gave it.

    Attributes:
      moments: [t,y,x,2z] f32, mean and then log variance of the latents, not normalised; of the largest clip of whole
        tokens in the stored one.
      caption: text.
      fps: frames a second.
      text: [n,E] f32, the caption as a frozen encoder gave it; None where it is encoded in training.
    """

    moments: np.ndarray
    caption: str
    fps: float
    text: np.ndarray | None = None


def to_record(clip: EncodedClip | BadClip) -> bytes:
    """A clip, or why there is none, as the bytes of a safetensors file."""
    from safetensors.numpy import save

    if isinstance(clip, BadClip):
        return save({"problem": _text(str(clip))})
    mean, logvar = np.split(np.asarray(clip.moments, np.float32), 2, axis=-1)
    text = {} if clip.text is None else {"text": np.ascontiguousarray(clip.text, np.float32)}
    return save(
        text
        | {
            "mean": np.ascontiguousarray(mean),
            "logvar": np.ascontiguousarray(logvar),
            "caption": _text(clip.caption),
            "fps": np.array([clip.fps], np.float32),
        }
    )


def from_record(record: bytes) -> EncodedClip:
    """Inverse of `to_record`. Raises BadClip: the reason in the record, or "unreadable record in the cache"."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(record)
        if "problem" in found:
            raise BadClip(found["problem"].tobytes().decode())
        moments = np.concatenate([found["mean"], found["logvar"]], axis=-1)
        caption, fps = found["caption"].tobytes().decode(), float(found["fps"][0])
        return EncodedClip(moments, caption, fps, found.get("text"))
    except (SafetensorError, KeyError, UnicodeDecodeError, IndexError) as e:
        raise BadClip("unreadable record in the cache") from e


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)


class Layout:
    """Which clip stands where in a cache.

    Attributes:
      fitted: [N,3] i64, (frames, height, width) that are encoded of each clip of the index; 0 where there is no token.
      order: [n] i64, clips of a pass as they stand in it: by width, height and frames, then by index.
      starts: [shards + 1] i64, where in `order` the shards of a pass begin.
      place: [N] i64, where in `order` each clip stands; -1 for those that have no whole token.
      bytes: [n] i64, of the moments of each clip in `order`, and of the longest caption as a frozen encoder gives it.
    """

    def __init__(self, sizes: ClipSizes, geometry: Geometry, text: Any = None):
        """`text`: the frozen encoder; None where text is bytes."""
        stored = [np.asarray(column, np.int64) for column in (sizes.frames, sizes.height, sizes.width)]
        sized = np.minimum.reduce(stored) > 0
        fitted = np.stack(geometry.fit(*(np.where(sized, column, 1) for column in stored)), axis=1)
        usable = sized & (fitted > 0).all(axis=1)
        self.fitted = np.where(usable[:, None], fitted, 0)
        clips = np.flatnonzero(usable)
        self.order = clips[np.lexsort(self.fitted[clips].T)]
        self.place = np.full(len(sizes), -1, np.int64)
        self.place[self.order] = np.arange(len(self.order))
        latents = np.prod(geometry.latent_grid(*self.fitted[self.order].T), axis=0)
        self.bytes = latents * geometry.channels * 2 * 4 + (text.limit * text.width * 4 if text else 0)
        ends = np.cumsum(self.bytes)
        total = int(ends[-1]) if len(ends) else 0
        size = min(max(total // 1000, SHARD_BYTES[0]), SHARD_BYTES[1])
        self.starts = np.append(np.flatnonzero(np.diff((ends - 1) // size, prepend=-1)), len(ends))

    @property
    def shards(self) -> int:
        """Shards of a pass."""
        return len(self.starts) - 1

    def shard(self, number: int) -> tuple[int, np.ndarray]:
        """(pass, clips in order) of a shard, counted through all passes."""
        epoch, k = divmod(number, self.shards)
        return epoch, self.order[self.starts[k] : self.starts[k + 1]]


def key(source: Source, tokenizer: Any, text: Any = None) -> dict[str, str]:
    """What the latents of a source depend on, by name: a cache serves where all of it is the same.

    `text`: the frozen encoder whose values are there as well; None where text is bytes.
    """
    g = tokenizer.geometry
    return {
        "format": str(FORMAT),
        "weights of the VAE": tokenizer.digest,
        "config.tokenizer.stride": "x".join(map(str, g.stride)),
        "config.tokenizer.patch": "x".join(map(str, g.patch)),  # decides where clips are cut
        "cut": CUT,
        "clips of config.data.source": source.fingerprint,
    } | ({"text encoder and tokenizer": text.digest, "config.rows.caption": str(text.limit)} if text else {})


def difference(there: dict[str, str], here: dict[str, str]) -> str:
    """In which parts two keys differ, in words; empty where in none."""
    names = [*here, *(name for name in there if name not in here)]
    differ = [n for n in names if there.get(n) != here.get(n)]
    return "; ".join(f"{n}: {there.get(n, 'not known')} there, {here.get(n, 'not known')} here" for n in differ)


def shard_path(directory: str | os.PathLike, number: int, kind: str = "array_record") -> Path:
    """Of shard `number`, counted through all passes; kind jsonl: of its part of the index."""
    return Path(directory) / f"latents-{number:06d}.{kind}"


def read_json(path: Path) -> dict[str, Any]:
    """Of a cache; raises ConfigError, FileNotFoundError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not what vidgen encode writes: {e}") from e


class CachedClips:
    """A `Source` whose clips are read as `EncodedClip`s: sizes, names and fingerprint are those of the clips.

    The fingerprint is the source's own, so a run may go on from a cache where it began online, and the other way round.
    With a frozen text encoder `empty`, [1,E] f32, is what it makes of the empty prompt.
    """

    def __init__(self, directory: str, source: Source, tokenizer: Any, text: Any = None):
        """Opens a finished cache of `source`.

        Raises ConfigError: no cache there, an unfinished one, one of another key (naming the parts), shards that are
        missing or not as long as they were.
        """
        self._directory = os.path.abspath(directory)
        what = f"config.data.latents={directory}"
        again = f"vidgen encode --config … --output {directory}"
        try:
            there = read_json(Path(directory) / KEY)
        except FileNotFoundError:
            raise ConfigError(f"{what}: no cache there; make it with {again}") from None
        if differ := difference(there, key(source, tokenizer, text)):
            raise ConfigError(f"{what}: a cache of something else ({differ}); make another with vidgen encode")
        self._layout = Layout(source.sizes, tokenizer.geometry, text)
        try:
            cache = read_json(Path(directory) / CACHE)
        except FileNotFoundError:
            done = sum(shard_path(directory, n).exists() for n in range(self._layout.shards))
            raise ConfigError(
                f"{what}: not finished, {done} of {self._layout.shards} shards are there; the same {again} goes on"
            ) from None
        try:
            self.passes, shards = int(cache["passes"]), [int(s["bytes"]) for s in cache["shards"]]
            self.bad = tuple((b["name"], b["reason"]) for b in cache["bad"])
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{Path(directory) / CACHE}: not what vidgen encode writes ({e})") from None
        if self.passes < 1 or len(shards) != self.passes * self._layout.shards:
            raise ConfigError(f"{what}: {len(shards)} shards in {CACHE}; expected {self.passes * self._layout.shards}")
        for number, size in enumerate(shards):
            path = shard_path(self._directory, number)
            found = path.stat().st_size if path.exists() else "missing"
            if found != size:
                raise ConfigError(f"{path}: {found}, expected {size} bytes; the same {again} makes it anew")
        self.empty = weights.read_safetensors(os.path.join(directory, TEXT))["empty"] if text else None
        self.sizes, self.fingerprint, self._source = source.sizes, source.fingerprint, source
        self._shards, self._records, self._lock = len(shards), None, threading.Lock()

    def _forget(self, records) -> None:
        """Has the files opened anew for the next read: one that could not be opened once is never tried again."""
        with self._lock:
            if self._records is records:
                self._records = None

    def __getstate__(self):
        return {**self.__dict__, "_records": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.sizes)

    def _open(self):
        with self._lock:
            if self._records is None:
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                paths = [str(shard_path(self._directory, n)) for n in range(self._shards)]
                self._records = ArrayRecordDataSource(paths)
            return self._records

    def read(self, index: int, epoch: int) -> EncodedClip:
        """Clip `index` of pass `epoch` mod `passes`. Raises BadClip with the reason that the cache knows."""
        place = int(self._layout.place[index])
        if place < 0:
            raise BadClip("no size in the index, or smaller than one token")
        records = self._open()
        try:
            record = records[epoch % self.passes * len(self._layout.order) + place]
        except Exception as e:  # ArrayRecord raises RuntimeError, ValueError, IndexError and more
            if passes(e):
                self._forget(records)
                raise
            raise BadClip("unreadable record in the cache") from e
        return from_record(record)

    def name(self, index: int) -> str:
        """The source's own name of the clip."""
        return self._source.name(index)

    def captions(self) -> list[str] | None:
        """The source's own."""
        return self._source.captions()


def open_clips(config: ConfigDict, tokenizer: Any, text: Any = None) -> Source | CachedClips:
    """What a denoiser trains on: the clips of `config.data`, or their latents in the cache `config.data.latents`.

    `text`: the frozen encoder of the captions, whose values are in the cache as well; None where text is bytes.

    Raises ConfigError as `open_source` and `CachedClips` do, and for a cache beside a tokenizer that wants none.
    """
    source = open_source(config.data, "train")
    if not config.data.latents:
        return source
    if not tokenizer.learned:
        raise ConfigError(
            f"config.data.latents={config.data.latents}: config.tokenizer.name={config.tokenizer.name} makes its "
            "latents in the step; a cache is for config.tokenizer.name=vae"
        )
    return CachedClips(config.data.latents, source, tokenizer, text)


def notes(
    source: Source | CachedClips, packing: Packing, tokenizer: Any, config: ConfigDict, text: Any = None
) -> list[str]:
    """What a run should say, as it starts, of how its clips become latents and its captions values; nothing of exact
    tokenizers and of bytes.

    Raises ConfigError for clips of more sizes than a VAE is compiled for while it trains.
    """
    if text and not isinstance(source, CachedClips):
        said = f"the text encoder {text.digest} encodes online, captions of at most {text.limit} tokens"
        return [said, *notes(source, packing, tokenizer, config)]
    if not tokenizer.learned:
        return []
    if isinstance(source, CachedClips):
        said = [f"latents are read from {config.data.latents}: {source.passes} pass(es), {len(source.bad)} bad clips"]
        needed = -(-config.train.steps // packing.steps_per_epoch) * packing.passes
        if config.data.source == "moving_shapes" and needed > source.passes:
            said.append(
                f"training draws {needed} passes, so clips come again, where encoding online would show new ones; "
                f"vidgen encode --passes {needed} makes them"
            )
        return said
    shapes = tokenizer.chunk_shapes(packing.sizes)
    listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
    return [f"the VAE {tokenizer.digest} encodes online, in {len(shapes)} chunk shapes: {listed}"]
