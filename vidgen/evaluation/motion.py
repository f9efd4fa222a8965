"""How the picture moves between frames, by matching windows of pixels. NumPy only.

Displacements are whole pixels of clips that are shrunk so that their shorter side is at most SIDE, and at most an
eighth of that side a frame. Each pixel's window is tried at every displacement, the smallest first, and a larger one
must match better by PENALTY grey levels a pixel: where the picture is plain, or only noise changes, nothing moves. What
is matched is how pixels differ from the mean around them, so that light that comes and goes is no motion either.
"""

from __future__ import annotations

import functools

import numpy as np

SIDE = 64  # pixels of the shorter side, of larger clips; then so many pixels of theirs are averaged to one
WINDOW = 7  # pixels
PENALTY = 1.0  # mean absolute difference of a window, in grey levels, that a pixel of displacement costs


def shrunk(video: np.ndarray) -> np.ndarray:
    """A clip [T,H,W,3] u8 as f32 [T,h,w,3], means over squares of pixels, min(h, w) ≤ SIDE; what is left over at the
    right and the bottom is cut.
    """
    factor = -(-min(video.shape[1:3]) // SIDE)
    if factor == 1:
        return video.astype(np.float32)
    t, h, w, c = video.shape
    h, w = h // factor, w // factor
    squares = video[:, : h * factor, : w * factor].reshape(t, h, factor, w, factor, c)
    return squares.mean(axis=(2, 4), dtype=np.float32)


def flow(a_HxWx3: np.ndarray, b_HxWx3: np.ndarray) -> np.ndarray:
    """Where each pixel of frame a is in frame b: [H,W,2] f32, (y, x) in pixels."""
    return _best(a_HxWx3, b_HxWx3, symmetric=False)[0]


def between(a_HxWx3: np.ndarray, b_HxWx3: np.ndarray) -> np.ndarray:
    """The frame half-way between two, [H,W,3] f32: what a steady motion would show there.

    Each pixel's window is looked for as far back in a as forth in b (bilateral motion estimation: Choi, Lee and Ko,
    2000), and is the mean of the two.
    """
    return _best(a_HxWx3, b_HxWx3, symmetric=True)[1]


def _best(a: np.ndarray, b: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """(displacements [H,W,2], mean of the two matched pixels [H,W,3])."""
    height, width = a.shape[:2]
    reach = max(1, min(height, width) // 8)

    def wide(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")

    detail_a, detail_b = (x - _windowed(x) for x in (a, b))
    wide_a, wide_b, wide_detail_a, wide_detail_b = map(wide, (a, b, detail_a, detail_b))

    def at(x: np.ndarray, dy: int, dx: int) -> np.ndarray:
        return x[reach + dy : reach + dy + height, reach + dx : reach + dx + width]

    best = np.full((height, width), np.inf, np.float32)
    moved = np.zeros((height, width, 2), np.float32)
    middle = np.zeros_like(a)
    for dy, dx in _displacements(reach):
        back = (-dy, -dx) if symmetric else (0, 0)
        unlike = np.abs(at(wide_detail_a, *back) - at(wide_detail_b, dy, dx)).mean(-1)
        cost = _windowed(unlike) + PENALTY * np.float32(np.hypot(dy, dx))
        better = cost < best - 1e-3
        best = np.where(better, cost, best)
        moved[better] = dy, dx
        middle[better] = (at(wide_a, *back)[better] + at(wide_b, dy, dx)[better]) / 2
    return moved, middle


@functools.cache
def _displacements(reach: int) -> tuple[tuple[int, int], ...]:
    """All within the reach, the smallest first."""
    line = range(-reach, reach + 1)
    return tuple(
        sorted(((y, x) for y in line for x in line if y * y + x * x <= reach * reach), key=lambda d: np.hypot(*d))
    )


def _windowed(x: np.ndarray) -> np.ndarray:
    """Means of [H,W,…] over WINDOW × WINDOW pixels, those beyond the edge taken from it."""
    for axis in (0, 1):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (WINDOW // 2 + 1, WINDOW // 2)
        total = np.moveaxis(np.pad(x, pad, mode="edge").cumsum(axis, dtype=np.float64), axis, 0)
        x = np.moveaxis((total[WINDOW:] - total[:-WINDOW]) / WINDOW, 0, axis).astype(np.float32)
    return x
