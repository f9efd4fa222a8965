"""Captions as rows have them: bytes, one a token, or the values that a frozen encoder gave.

Bytes are a caption's UTF-8 in any script; the encoder over them trains with the denoiser. See `vidgen/text/` for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vidgen.data.sources import Source

if TYPE_CHECKING:  # a room above
    from vidgen.text.frozen import FrozenEncoder

PADDING = 0
BEGIN = 1
VOCAB = 258  # padding, begin, and the 256 bytes
COUNTED = 200_000  # captions of an index whose tokens are counted before training starts


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


def caption_lengths(source: Source, text: FrozenEncoder | None, longest: int) -> np.ndarray | None:
    """[N] i64 text tokens that each clip's caption has, or may have, before it is cut; None: bytes, as the index says.

    Args:
      source: of the clips.
      text: the frozen encoder that counts; None where text is bytes.
      longest: tokens a caption at most, `config.rows.caption`: what is planned for a caption that is not in the index,
        and for those of a very long index.
    """
    if text is None:
        return None
    captions = source.captions() if text.directory and len(source.sizes) <= COUNTED else None
    return np.full(len(source.sizes), longest, np.int64) if captions is None else text.lengths(captions)
