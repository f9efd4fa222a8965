"""What a clip is, and what an index knows of it before it is read."""

from __future__ import annotations

import dataclasses

import numpy as np


class BadClip(ValueError):
    """A clip that cannot be used. Its message is the reason, short and the same for the same fault: it is counted."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A captioned video; an image is a clip of one frame.

    Attributes:
      video: [T,H,W,3] u8, RGB.
      caption: text in any script, never empty.
      fps: frames a second, > 0.
    """

    video: np.ndarray
    caption: str
    fps: float


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """The columns of an index that order and packing need; N clips.

    Attributes:
      frames, height, width: [N] i32, as stored.
      fps: [N] f32.
      text: [N] i32, bytes of the caption in UTF-8 (an upper bound where a clip's caption varies by epoch).
    """

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)
