"""Images and videos from disk, at the size and the frame rate of a sample."""

from __future__ import annotations

import difflib
import os
import sys

import numpy as np
from ml_collections import ConfigDict

from vidgen.conditioning.given import Given, check_kind, frames_of
from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.data.clip import BadClip

MOST_ENLARGED = 4.0  # times; a smaller picture is refused


def read(config: ConfigDict, first_frame: str = "", last_frame: str = "", extend: str = "") -> Given | None:
    """What the files give a sample of `config.sample`; None where none is named.

    Any image or video that PyAV reads serves each: of a video its first frame, its last, or its end. Pictures are
    scaled to cover the sample and cut to their middle. A clip to go on from is read at the sample's frame rate.

    Raises ConfigError: a file that is missing, can't be read, or is too small; frames that exclude one another; a
    model that was not trained with such, or never without.
    """
    if extend and (first_frame or last_frame):
        raise ConfigError("--extend gives the first frames of the sample; leave out --first_frame and --last_frame")
    if last_frame and not first_frame:
        raise ConfigError("--last_frame goes with --first_frame, and there is none; give both, or the first alone")
    if not (first_frame or extend):
        shares = [share for _, share in config.control.masks]
        if sum(shares) > 1 - 1e-6 or (config.control.channels == "wan" and not shares):
            raise ConfigError("this model always saw frames beside the caption: expected --first_frame IMAGE")
        return None
    check_kind(config, "extend" if extend else "first_last" if last_frame else "first")
    s = config.sample
    if extend:
        return Given(extend=clip(extend, config))
    first = picture(first_frame, "first_frame", s.height, s.width)
    return Given(first, picture(last_frame, "last_frame", s.height, s.width, -1) if last_frame else None)


def picture(path: str, flag: str, height: int, width: int, frame: int = 0) -> np.ndarray:
    """[H,W,3] u8: the frame 0 or -1 of a file, scaled to cover and cut to its middle; raises ConfigError."""
    info = _probe(path, flag, height, width)
    start = frame % info.frames
    return _read(path, flag, info, np.array([start]), height, width)[0]


def clip(path: str, config: ConfigDict) -> np.ndarray:
    """[T,H,W,3] u8: the frames at a file's end that a sample of `config.sample` starts with; raises ConfigError.

    Shown at the sample's frame rate: of each moment the frame nearest to it. What is left out is said on stderr.
    """
    s, info = config.sample, _probe(path, "extend", config.sample.height, config.sample.width)
    moments = info.times[-1] - np.arange(int(info.times[-1] * s.fps + 1e-3) + 1)[::-1] / s.fps  # ends with its end
    picked = np.searchsorted((info.times[1:] + info.times[:-1]) / 2, moments)
    count = frames_of(len(picked), config)
    if count < info.frames:
        rate = "" if abs(info.fps / s.fps - 1) < 0.01 else f", its {info.fps:g} a second read at {s.fps:g}"
        print(
            f"--extend={path}: the sample starts with {count} frames, the end of {info.frames}{rate}", file=sys.stderr
        )
    return _read(path, "extend", info, picked[-count:], s.height, s.width)


def _probe(path: str, flag: str, height: int, width: int) -> decode.VideoInfo:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = os.listdir(folder) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        hint = f"; did you mean {os.path.join(os.path.dirname(path), near[0])}?" if near else ""
        raise ConfigError(f"--{flag}={path}: {'a folder' if os.path.isdir(path) else 'no such file'}{hint}")
    try:
        info = decode.probe(path)
    except (BadClip, OSError) as e:
        raise ConfigError(f"--{flag}={path}: {e}; expected an image or a video, such as .png, .jpg or .mp4") from None
    shown = (info.height, info.width * info.aspect)
    if max(height / shown[0], width / shown[1]) > MOST_ENLARGED:
        raise ConfigError(
            f"--{flag}={path}: {info.height}x{info.width} pixels are too few for a sample of {height}x{width}; "
            f"expected {-(-height // int(MOST_ENLARGED))}x{-(-width // int(MOST_ENLARGED))} or more"
        )
    return info


def _read(path: str, flag: str, info: decode.VideoInfo, picked: np.ndarray, height: int, width: int) -> np.ndarray:
    """[len(picked),H,W,3] u8 of frames in rising order, scaled to cover and cut to their middle."""
    shown = (info.height, info.width * info.aspect)
    factor = max(height / shown[0], width / shown[1])
    scaled = max(height, round(shown[0] * factor)), max(width, round(shown[1] * factor))
    y, x = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    first, stop = int(picked[0]), int(picked[-1]) + 1
    wanted, frames = set(picked.tolist()), {}
    try:
        for n, frame in enumerate(decode.stream_frames(path, info, first, stop), first):
            if n in wanted:
                frames[n] = decode.to_rgb(frame, *scaled)[y : y + height, x : x + width]
    except BadClip as e:
        raise ConfigError(f"--{flag}={path}: {e}; expected a file that decodes to its end") from None
    return np.stack([frames[n] for n in picked.tolist()])
