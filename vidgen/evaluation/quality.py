"""How far a reconstructed clip is from its original, pixel by pixel and frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.data.scenes import Scene, coverage, times
from vidgen.objectives.lpips import LEAST, lpips

CEILING = 100.0  # dB of clips that are equal, so that means over clips stay finite
WINDOW = 11  # pixels of SSIM's window; smaller frames have no SSIM


def psnr(original: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio of clips of one shape, in dB; CEILING at most, which equal clips get.

    Args:
      original, other: [T,H,W,3], of 0 to 255.
      mask: [T,H,W] bool, the pixels that count; None: all.

    Raises ValueError where no pixel counts.
    """
    error = np.square(original.astype(np.float32) - other.astype(np.float32))
    error = error if mask is None else error[mask]
    if not error.size:
        raise ValueError("PSNR of no pixel")
    mean = float(error.mean(dtype=np.float64))
    return min(CEILING, 10 * float(np.log10(255**2 / mean))) if mean else CEILING


def still_psnr(video: np.ndarray) -> float:
    """PSNR of a clip [T,H,W,3] u8 against its own mean frame: what a picture without motion would reach at best."""
    return psnr(video, np.broadcast_to(video.mean(axis=0), video.shape))


def ssim(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame of two u8 clips [T,H,W,3], [T] f32, 1 for equal ones.

    As Wang et al. (2004) measure it and scikit-image with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255`: a Gaussian window of 11×11 pixels and σ = 1.5, K = (0.01, 0.03), the
    mean over the channels and over all windows that lie within the frame. H and W at least WINDOW.
    """
    if min(original.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM of {original.shape[1]}x{original.shape[2]} frames: expected {WINDOW}x{WINDOW} or more")
    return np.concatenate([_ssim(a[None], b[None]) for a, b in zip(original, other, strict=True)])


@jax.jit
def _ssim(a_NxHxWx3: jax.Array, b_NxHxWx3: jax.Array) -> jax.Array:
    # Moments about mid-grey, else f32 would lose the small variances of bright pictures.
    a, b = (x.astype(jnp.float32) - 127.5 for x in (a_NxHxWx3, b_NxHxWx3))
    mean_a, mean_b, aa, bb, ab = (_blur(x) for x in (a, b, a * a, b * b, a * b))
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + 127.5, mean_b + 127.5
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (ratio / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


def _blur(x_NxHxWxC: jax.Array) -> jax.Array:
    """SSIM's window, one axis after the other, as sums of shifts: much faster on a CPU than a convolution."""
    taps = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / 1.5))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        x_NxHxWxC = jax.lax.optimization_barrier(x_NxHxWxC)  # else XLA would fuse the two axes into 121 taps
        size = x_NxHxWxC.shape[axis] - WINDOW + 1
        x_NxHxWxC = sum(
            tap * jax.lax.slice_in_dim(x_NxHxWxC, i, i + size, axis=axis) for i, tap in enumerate(taps.tolist())
        )
    return x_NxHxWxC


def flicker(video: np.ndarray) -> float:
    """Mean absolute change of a u8 clip [T,H,W,3] from each frame to the next, of the range of pixels: 0 to 1.

    1 - this is VBench's temporal flickering score (Huang et al., arXiv:2311.17982, which measures it on clips without
    motion). An image has none.
    """
    return _change(video.astype(np.float32))


def unsteadiness(original: np.ndarray, other: np.ndarray) -> float:
    """The flicker of the error: mean absolute change, 0 to 1, that is not in the original [T,H,W,3] u8.

    A blur that stays in place has none; a clip may flicker less than its original and yet have some.
    """
    return _change(other.astype(np.float32) - original.astype(np.float32))


def _change(x: np.ndarray) -> float:
    return float(np.abs(np.diff(x, axis=0)).mean(dtype=np.float64)) / 255 if len(x) > 1 else 0.0


def boxes(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """The pixels within the bounding boxes of a scene's objects, each frame: [T,H,W] bool.

    Ground truth: the boxes hold every pixel that an object covers in part, also where another object hides it.
    """
    inside = np.zeros((frames, height, width), bool)
    cuts = scene.cuts(frames)
    side = min(height, width)
    x = ((np.arange(width) + 0.5 - width / 2) / side)[None, None, :]
    y = ((np.arange(height) + 0.5 - height / 2) / side)[None, :, None]
    for shot, first, end in zip(scene.shots, cuts[:-1], cuts[1:], strict=True):
        time = times(end - first)
        world_x, world_y = shot.camera.world(x, y, time[:, None, None])
        pixel = np.exp(-shot.camera.zoom * time)[:, None, None] / side
        for thing, path in zip(scene.objects, shot.paths, strict=True):
            cx, cy = np.moveaxis(path.at(time), -1, 0)[..., None, None]
            covered = coverage(thing.shape, world_x - cx, world_y - cy, thing.radius, pixel) > 0
            inside[first:end] |= _hull(covered.any(2))[:, :, None] & _hull(covered.any(1))[:, None, :]
    return inside


def _hull(line_TxN: np.ndarray) -> np.ndarray:
    """From the first to the last True of each row."""
    return np.logical_or.accumulate(line_TxN, 1) & np.logical_or.accumulate(line_TxN[:, ::-1], 1)[:, ::-1]


@jax.jit
def _distances(params, a_NxHxWx3: jax.Array, b_NxHxWx3: jax.Array) -> jax.Array:
    return lpips(params, *(x.astype(jnp.float32) / 127.5 - 1 for x in (a_NxHxWx3, b_NxHxWx3)))


def perceptual_distance(params, original: np.ndarray, other: np.ndarray) -> float:
    """LPIPS (VGG16) of two u8 clips [T,H,W,3]: the mean over their frames, which go through the network in pieces."""
    frames, height, width = original.shape[:3]
    at_once = max(1, min(16, 2**18 // (height * width)))  # near 0.5 GB of features
    total = 0.0
    for first in range(0, frames, at_once):
        take = np.arange(first, first + at_once)
        distance = _distances(params, *(x[np.minimum(take, frames - 1)] for x in (original, other)))
        total += float(np.asarray(distance, np.float64)[take < frames].sum())
    return total / frames


def alike(original: np.ndarray, other: np.ndarray, net: Any = None) -> dict[str, float | None]:
    """{"ssim", "lpips"} of two u8 clips [T,H,W,3], means over frames; None for frames too small, or without `net`."""
    small = min(original.shape[1:3])
    return {
        "ssim": float(ssim(original, other).mean()) if small >= WINDOW else None,
        "lpips": perceptual_distance(net, original, other) if net is not None and small >= LEAST else None,
    }


def mean_alike(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over what `alike` gave of clips; None where it gave nothing."""
    known = {name: [row[name] for row in rows if row[name] is not None] for name in ("ssim", "lpips")}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}
