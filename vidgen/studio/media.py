"""Clips put side by side, made large enough to see, and written to files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.training import incidents
from vidgen.training.journal import complain

GROUND = 48  # grey between and around clips: apart from black grounds and from white ones


def to_u8(video: Any, xp: Any = np) -> Any:
    """Video around [-1, 1] as the nearest bytes, clipped; `xp` is numpy or jax.numpy."""
    return xp.round(xp.clip((video + 1) * 127.5, 0, 255)).astype(xp.uint8)


def grid(
    videos: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    columns: int = 0,
    pad: int = 2,
    scale: int = 1,
) -> np.ndarray:
    """Clips in rows and columns, as one clip.

    Every clip stands in the middle of a cell as large as the largest of them; a clip that ends before the longest one
    holds its last frame.

    Args:
      videos: [T,H,W,3] u8 each, of any sizes. A flat list fills row after row; a list of lists is rows as they are.
      columns: of a flat list; 0: about as many as there are rows.
      pad: pixels between cells and around them, before scaling.
      scale: each pixel becomes scale × scale of them.

    Returns:
      [T,H,W,3] u8, T of the longest clip.

    Raises ValueError if there is no clip.
    """
    rows = _rows(videos, columns)
    clips = [clip for row in rows for clip in row]
    if not clips:
        raise ValueError("a grid needs at least one clip")
    frames, height, width = np.max([clip.shape[:3] for clip in clips], axis=0)
    across = max(len(row) for row in rows)
    canvas = np.full(
        (frames, pad + len(rows) * (height + pad), pad + across * (width + pad), 3), GROUND, dtype=np.uint8
    )
    for r, row in enumerate(rows):
        for c, clip in enumerate(row):
            t, h, w, _ = clip.shape
            y = pad + r * (height + pad) + (height - h) // 2
            x = pad + c * (width + pad) + (width - w) // 2
            canvas[:t, y : y + h, x : x + w] = clip
            canvas[t:, y : y + h, x : x + w] = clip[-1]
    return enlarge(canvas, scale)


def _rows(videos, columns: int) -> list[list[np.ndarray]]:
    videos = list(videos)
    if videos and not isinstance(videos[0], np.ndarray):
        return [list(row) for row in videos]
    columns = columns or max(1, math.ceil(math.sqrt(len(videos))))
    return [videos[i : i + columns] for i in range(0, len(videos), columns)]


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """[...,H,W,3] → [...,H·scale,W·scale,3]: nearest neighbour, so that small clips stay crisp."""
    return video.repeat(scale, axis=-3).repeat(scale, axis=-2)


def save_video(path: str, video: np.ndarray, fps: float) -> None:
    """Writes a clip, [T,H,W,3] u8, as its suffix says: .mp4, .gif, or .png for a clip of one frame.

    Folders on the way are made; a file that was there is replaced in one move. Raises ConfigError for another suffix,
    and where the file can't be written.
    """
    suffix = check_suffix(path, len(video))
    if suffix == ".mp4":
        write(path, decode.encode(video, fps))
    elif suffix == ".gif":
        write(path, decode.encode_gif(video, fps))
    else:
        write(path, decode.encode_png(video[0]))


def check_suffix(path: str, frames: int = 2) -> str:
    """The suffix of an output for a clip of so many frames; ConfigError where `save_video` would refuse it."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".png" and frames > 1:
        raise ConfigError(f"output {path}: a .png holds one frame and the clip has {frames}; expected .mp4 or .gif")
    if suffix not in (".mp4", ".gif", ".png"):
        raise ConfigError(f"output {path}: unknown suffix {suffix!r}; expected .mp4 or .gif (.png for one frame)")
    return suffix


class Unwritable(ConfigError):
    """A file can't be written: the disk's fault, or its path's."""


@contextlib.contextmanager
def best_effort(workdir: str, step: int, what: str, say: Callable[[str], None] = complain) -> Iterator[None]:
    """A picture is not worth a run: where `what` can't be written inside, that is said, recorded, and passed over.

    Args:
      workdir: whose incidents.jsonl is to know.
      step: after which it was to be written.
      what: "the samples", say.
      say: is given the line.
    """
    try:
        yield
    except (Unwritable, OSError) as e:
        why = str(e) if isinstance(e, Unwritable) else f"{e.filename or 'a file'}: {e.strerror or e}"
        text = f"step {step}: {what} passed over: {why}"
        say(text)
        incidents.record(workdir, step, "disk", text)


def write(path: str, data: bytes) -> None:
    """Writes a file in one move, with the folders on the way; Unwritable, a ConfigError, where that can't be done."""
    folder = os.path.dirname(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if folder:
            os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data)
            os.replace(temporary, path)
        except OSError:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    except FileExistsError:  # makedirs' word for a file where a folder should be
        raise Unwritable(f"cannot write {path}: {folder} is not a folder") from None
    except OSError as e:
        raise Unwritable(f"cannot write {path}: {e.strerror or e}") from None
