"""Where clips come from: `Source` is all that order, packing and feed know of it."""

from __future__ import annotations

from typing import Protocol

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
