"""What the camera does in a video of moving shapes: cuts, and a steady pan, zoom or rotation of the background."""

from __future__ import annotations

import dataclasses

import numpy as np

_CUT = 20.0  # mean change of a pixel, in units of u8, from which on a cut is possible
_CHANGE = 0.25  # mean change of a background pixel, in units of u8, below which the camera stands still
_TEXTURE = (
    4.0  # standard deviation of the background's brightness, in units of u8, below which nothing can be seen to move
)
_STEPS = 12  # of Gauss-Newton, at each blur


@dataclasses.dataclass(frozen=True)
class View:
    """A similarity that takes a point of the background from each frame to where it is in the next.

    Points are complex numbers x + iy, in sides from the frame's centre: the next frame shows q at factor·q + shift.
    """

    factor: complex = 1 + 0j
    shift: complex = 0j

    def times(self, count: float) -> View:
        """`count` of these motions, one after the other; a fraction undoes a multiple."""
        factor = self.factor**count
        turned = abs(self.factor - 1) > 1e-9
        return View(factor, self.shift * ((factor - 1) / (self.factor - 1) if turned else count))

    def rotation(self, frames: int) -> np.ndarray:
        """[T] radians that the picture has turned by, clockwise."""
        return np.angle(self.factor) * np.arange(frames)

    def scale(self, frames: int) -> np.ndarray:
        """[T], how much larger things look than at first."""
        return np.abs(self.factor) ** np.arange(frames)

    def home(self, points: np.ndarray) -> np.ndarray:
        """Points [T,2], one a frame, carried back to where they would be in the first frame."""
        q = points[:, 0] + 1j * points[:, 1]
        for t in range(1, len(q)):  # step t undoes one frame's motion of all later frames
            q[t:] = (q[t:] - self.shift) / self.factor
        return np.stack([q.real, q.imag], -1)


def cut(video: np.ndarray) -> int:
    """The first frame of the second shot of a video [T,H,W,3] u8, or 0 where there is one shot."""
    if len(video) < 4:
        return 0
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    t = int(change.argmax())
    return t + 1 if 1 <= t < len(change) - 1 and change[t] > max(_CUT, 3 * float(np.median(change))) else 0


def _blur(x: np.ndarray, radius: int) -> np.ndarray:
    """Box filter of [T,H,W], twice in each direction."""
    for axis in (1, 1, 2, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (radius + 1, radius)
        total = np.cumsum(np.pad(x, pad, mode="edge"), axis=axis, dtype=np.float64)
        n = x.shape[axis]
        x = (np.take(total, range(2 * radius + 1, 2 * radius + 1 + n), axis) - np.take(total, range(n), axis)) / (
            2 * radius + 1
        )
    return x


def _grid(height: int, width: int) -> np.ndarray:
    """Pixel centres as complex numbers [H,W]."""
    side = min(height, width)
    return ((np.arange(width) + 0.5 - width / 2)[None] + 1j * (np.arange(height) + 0.5 - height / 2)[:, None]) / side


def _sample(images: np.ndarray, points: np.ndarray) -> np.ndarray:
    """[T,H,W,C] at points [H,W], bilinear; points outside take the nearest pixel."""
    height, width = images.shape[1:3]
    side = min(height, width)
    x = np.clip(points.real * side + width / 2 - 0.5, 0, width - 1)
    y = np.clip(points.imag * side + height / 2 - 0.5, 0, height - 1)
    x0, y0 = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = images[:, y0, x0] * (1 - fx) + images[:, y0, x0 + 1] * fx
    bottom = images[:, y0 + 1, x0] * (1 - fx) + images[:, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which points [H,W] lie in the frame."""
    side = min(height, width)
    return (np.abs(points.real) < width / side / 2) & (np.abs(points.imag) < height / side / 2)


def aligned(shot: np.ndarray, covered: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Each frame beside the next one as it would be had the camera stood still.

    Args:
      shot: [T,H,W,3] u8.
      covered: [T,H,W] bool, what isn't background.

    Returns:
      change: [T-1,H,W] f32, mean difference of the channels, in units of u8.
      valid: [T-1,H,W] bool, background in both.
    """
    shot = shot.astype(np.float32)
    if view == View():
        return np.abs(shot[1:] - shot[:-1]).mean(-1), ~(covered[1:] | covered[:-1])
    height, width = shot.shape[1:3]
    points = view.factor * _grid(height, width) + view.shift
    ahead = _sample(np.concatenate([shot[1:], covered[1:, ..., None]], -1), points)
    valid = _inside(points, height, width) & (ahead[..., 3] == 0) & ~covered[:-1]
    return np.abs(ahead[..., :3] - shot[:-1]).mean(-1), valid


def estimate(shot: np.ndarray, covered: np.ndarray) -> View:
    """The steady camera motion of a shot [T,H,W,3] u8, from its background, [T,H,W] bool `covered` left out.

    Lucas and Kanade's registration (1981) with four parameters for the whole shot, from a strong blur to a weak one.
    A motion must explain the change of the background far better than none does, else the camera stands still.
    """
    still = View()
    if len(shot) < 2:
        return still
    change, valid = aligned(shot, covered, still)
    if not valid.any() or change[valid].mean() < _CHANGE or np.std(shot[~covered].mean(-1)) < _TEXTURE:
        return still
    height, width = shot.shape[1:3]
    side, grid = min(height, width), _grid(height, width)
    grey, weight = shot.mean(-1, dtype=np.float32), (~covered).astype(np.float32)
    view = still
    far = min(4, len(shot) - 1)  # frames that lie apart show small motions best
    for radius, gap in ((0.06, 1), (0.02, 1), (0.02, far)):
        radius = max(1, round(radius * side))
        smooth = _blur(grey * weight, radius) / np.maximum(_blur(weight, radius), 1e-3)
        slope_y, slope_x = np.gradient(smooth, 1 / side, axis=(1, 2))
        stack = np.stack([smooth, slope_x, slope_y, weight], -1)
        view = _register(stack, gap, view.times(gap), grid).times(1 / gap)
    if not 0.8 < abs(view.factor) < 1.25 or abs(view.shift) > 0.25:
        return still
    errors = []
    for option in (view, still):
        error, _, _, trust = _compare(stack, far, option.times(far), grid)
        errors.append(float((np.square(error) * trust).sum() / max(trust.sum(), 1.0)))
    return view if errors[0] < 0.5 * errors[1] else still


def _compare(stack: np.ndarray, gap: int, view: View, grid: np.ndarray) -> tuple[np.ndarray, ...]:
    """Frames `gap` later carried back by `view`: their difference, their slopes, where both show background."""
    points = view.factor * grid + view.shift
    ahead, gx, gy, seen = np.moveaxis(_sample(stack[gap:], points), -1, 0)
    trust = _inside(points, *grid.shape) * seen * stack[:-gap, ..., 3]
    return ahead - stack[:-gap, ..., 0], gx, gy, trust


def _register(stack: np.ndarray, gap: int, view: View, grid: np.ndarray) -> View:
    """Gauss-Newton from `view` on; `stack` [T,H,W,4]: brightness, its slopes in x and y, and where it counts."""
    for _ in range(_STEPS):
        error, gx, gy, trust = _compare(stack, gap, view, grid)
        slopes = np.stack([gx, gy, gx * grid.real + gy * grid.imag, gy * grid.real - gx * grid.imag], -1)
        weighted = (slopes * trust[..., None]).reshape(-1, 4)
        system = weighted.T @ slopes.reshape(-1, 4)
        step = np.linalg.solve(system + (1e-6 * np.trace(system) + 1e-9) * np.eye(4), weighted.T @ error.reshape(-1))
        factor = view.factor - complex(step[2], step[3])
        view = View(factor if abs(factor) > 0.1 else 1 + 0j, view.shift - complex(step[0], step[1]))
    return view
