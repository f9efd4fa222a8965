"""Which arrays hold the layers of a `scan`, one behind the other, along their first axis."""

from __future__ import annotations

import re

_STACKED = re.compile(r"(^|/)(\w+_)?blocks/")


def is_stacked(path: str) -> bool:
    """Whether the first axis of the parameter at `path` is a layer: `blocks/…`, `in_blocks/…`, `out_blocks/…`."""
    return _STACKED.search(path) is not None
