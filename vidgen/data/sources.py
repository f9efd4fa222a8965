"""Where clips come from: `Source` is all that order, packing and feed know of it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.data.clip import Clip, ClipSizes


class Source(Protocol):
    """N clips of known size, read by index. Picklable, safe to read from several threads.

    Attributes:
      sizes: what the index says of each clip.
      fingerprint: a short hash of everything that decides what `read` returns: a run resumes only on the same.
    """

    sizes: ClipSizes
    fingerprint: str

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` in pass `epoch` (both from 0). Its size is the index's, whatever the epoch.

        Raises BadClip if it cannot be decoded.
        """
        ...

    def name(self, index: int) -> str:
        """How people find clip `index` again: a file and time, an id."""
        ...

    def captions(self) -> list[str] | None:
        """Of all clips, where the index has them; None where a clip must be read for its caption."""
        ...


class Subset:
    """Some clips of a source, in the order of `indices` ([N] i64)."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, np.asarray(indices, np.int64)
        columns = (getattr(source.sizes, field.name)[self._indices] for field in dataclasses.fields(ClipSizes))
        self.sizes = ClipSizes(*columns)
        chosen = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()[:16]
        self.fingerprint = f"{source.fingerprint}-{chosen}"

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, epoch: int) -> Clip:
        return self._source.read(int(self._indices[index]), epoch)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def captions(self) -> list[str] | None:
        found = self._source.captions()
        return found and [found[i] for i in self._indices]


def open_source(data: ConfigDict, split: str) -> Source:
    """The clips that `config.data` names.

    Args:
      data: `data.source` is moving_shapes, a directory of shards, or tfds:NAME[/CONFIG][:VERSION].
      split: "train" or "heldout". `data.holdout` is the share held out, by a hash of the file that a clip was cut
        from, so that all clips of a file are on one side, whatever else is in the source. With a share of 0 the
        held-out clips are the training clips. Moving shapes keep combinations of attributes apart on their own.

    Raises ConfigError for a source that isn't there, a split that isn't one, and a share that leaves a side empty.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f"split {split!r}: expected train or heldout")
    if data.source == "moving_shapes":
        from vidgen.data.moving_shapes import MovingShapes

        return MovingShapes.from_config(data.moving_shapes, split)
    if data.source.startswith("tfds:"):
        from vidgen.data.tfds_source import TfdsSource

        source = TfdsSource(data.source, video=data.video_feature, text=data.text_feature, fps=data.fps)
    elif os.path.isdir(data.source):
        from vidgen.data.shards import ShardSource

        source = ShardSource(data.source)
    else:
        near = difflib.get_close_matches(data.source, ["moving_shapes"], cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"config.data.source={data.source}: expected moving_shapes, a directory of shards, or tfds:NAME{hint}"
        )
    return _side(source, data.holdout, split)


def _side(source: Source, holdout: float, split: str) -> Source:
    if not 0 <= holdout < 1:
        raise ConfigError(f"config.data.holdout={holdout}: expected a share, 0 up to but not including 1")
    if holdout == 0:
        return source
    group = getattr(source, "group", source.name)
    groups = [group(i) for i in range(len(source.sizes))]
    out = {g: int.from_bytes(hashlib.sha256(g.encode()).digest()[:8], "big") < holdout * 2**64 for g in set(groups)}
    if len(set(out.values())) < 2:
        side = "nothing to train on" if all(out.values()) else "nothing held out"
        raise ConfigError(f"config.data.holdout={holdout} leaves {side} of {len(out)} files; choose another share")
    held = np.array([out[g] for g in groups])
    return Subset(source, np.flatnonzero(held if split == "heldout" else ~held))
