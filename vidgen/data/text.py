"""Text as bytes: a caption in any script is its UTF-8, one byte a token."""

from __future__ import annotations

import numpy as np

PADDING = 0
BEGIN = 1
VOCAB = 258  # padding, begin, and the 256 bytes


def encode_text(caption: str, limit: int) -> np.ndarray:
    """Ids of a caption: `BEGIN`, then its UTF-8 bytes as 2..257.

    Args:
      caption: text; the empty one (a dropped caption, a negative prompt) is `BEGIN` alone.
      limit: ids at most, ≥ 1; a longer caption is cut at a whole character.

    Returns:
      [length] i32 in [1, VOCAB), 1 ≤ length ≤ limit.
    """
    data = caption.encode("utf-8", errors="replace")  # lone surrogates, which UTF-8 has no bytes for, become "?"
    if len(data) > limit - 1:
        data = data[: limit - 1].decode("utf-8", errors="ignore").encode("utf-8")
    return np.concatenate([[BEGIN], np.frombuffer(data, np.uint8).astype(np.int32) + 2]).astype(np.int32)
