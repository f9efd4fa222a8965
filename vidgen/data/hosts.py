"""Which rows of a step this host reads, how they become arrays over all devices, and what it says of bad clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from vidgen.data.sources import Source
from vidgen.data.stream import FeedInfo
from vidgen.parallel.mesh import ROWS

BadClips = list[tuple[int, str]]  # (index, reason)


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Which of a step's `count` rows this host's devices hold any part of, in order."""
    held = NamedSharding(mesh, ROWS).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in held]))


def counted_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Those of `local_rows` that this host answers for, where it shares them: each row has one such host."""
    owner = np.full(count, jax.process_count())
    for device, index in NamedSharding(mesh, ROWS).devices_indices_map((count,)).items():
        owner[index] = np.minimum(owner[index], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def placed(leaf: np.ndarray, local: np.ndarray, count: int, sharding: NamedSharding) -> jax.Array:
    """The rows `local` of a step, [b,…], → the global array [count,…]; `local` are those of `local_rows`."""

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(count)
        return leaf[(slice(*np.searchsorted(local, (first, stop))), *index[1:])]

    return jax.make_array_from_callback((count, *leaf.shape[1:]), sharding, piece)


class Unreadable:
    """Logs the clips of a source that cannot be read, each once for each reason, and counts them."""

    def __init__(self, source: Source):
        self._source = source
        self._logged: set[tuple[int, str]] = set()

    def info(self, local: np.ndarray, bad: Sequence[BadClips], counted: np.ndarray) -> FeedInfo:
        """Of a batch.

        Args:
          local: rows that this host has read.
          bad: of each of them, the clips that could not be read.
          counted: those of the rows that this host answers for.
        """
        answered, indices = [], []
        for row, clips in zip(local, bad, strict=True):
            for clip, reason in clips:
                if (clip, reason) not in self._logged:
                    logging.warning("clip %s (index %d) is left out: %s", self._source.name(clip), clip, reason)
                    self._logged.add((clip, reason))
                if row in counted:
                    answered.append((self._source.name(clip), reason))
                    indices.append(clip)
        return FeedInfo(0.0, dict(Counter(reason for _, reason in answered)), tuple(answered), tuple(indices))
