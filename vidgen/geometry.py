"""Pixels ↔ latents ↔ tokens, as arithmetic.

Every tokenizer here is *causal in time*: the first frame of a clip is a latent frame of its own, and each further
latent frame holds `stride[0]` frames, so a clip of 1 + k·stride[0] frames has 1 + k latent frames, an image is a
clip of one frame, and a video can be continued from its first frame (Yu et al., MAGVIT-v2, arXiv:2310.05737).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

Grid = tuple[int, int, int]  # (t, y, x)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What one token covers.

    stride: pixels a latent covers in (t, y, x).
    patch: latents a token covers in (t, y, x).
    channels: channels of a latent.
    """

    stride: Grid
    patch: Grid
    channels: int

    @property
    def block(self) -> Grid:
        """Pixels (frames, height, width) that one token covers."""
        return tuple(s * p for s, p in zip(self.stride, self.patch, strict=True))

    @property
    def features(self) -> int:
        """P, the width of a token: `channels` × latents in a patch."""
        return self.channels * math.prod(self.patch)

    def fit(self, frames: Any, height: Any, width: Any) -> tuple[Any, Any, Any]:
        """The largest clip no larger than the given one that cuts into whole tokens (0 where there is none).

        Works on integers and on integer arrays alike, so that an index of clips is fitted at once.
        """
        latent_frames = (frames - 1) // self.stride[0] + 1  # of frames ≥ 1
        latent_frames = latent_frames // self.patch[0] * self.patch[0]
        fitted = (latent_frames - 1) * self.stride[0] + 1
        fitted = fitted * (latent_frames > 0)
        return fitted, height // self.block[1] * self.block[1], width // self.block[2] * self.block[2]

    def cover(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The smallest clip no smaller than the given one that cuts into whole tokens."""
        latent_frames = -(-(frames - 1) // self.stride[0]) + 1
        latent_frames = -(-latent_frames // self.patch[0]) * self.patch[0]
        return (
            (latent_frames - 1) * self.stride[0] + 1,
            -(-height // self.block[1]) * self.block[1],
            -(-width // self.block[2]) * self.block[2],
        )

    def latent_grid(self, frames: Any, height: Any, width: Any) -> tuple[Any, Any, Any]:
        """Latents (t, y, x) of a clip whose size `fit` returned."""
        return (frames - 1) // self.stride[0] + 1, height // self.stride[1], width // self.stride[2]

    def grid(self, frames: Any, height: Any, width: Any) -> tuple[Any, Any, Any]:
        """Tokens (t, y, x) of a clip whose size `fit` returned."""
        t, y, x = self.latent_grid(frames, height, width)
        return t // self.patch[0], y // self.patch[1], x // self.patch[2]

    def tokens(self, frames: Any, height: Any, width: Any) -> Any:
        """How many tokens a clip has whose size `fit` returned."""
        t, y, x = self.grid(frames, height, width)
        return t * y * x

    def coords(self, frames: int, height: int, width: int, fps: float | None = None) -> np.ndarray:
        """[tokens, 3] f32: (t, y, x) of a fitted clip's tokens, in patches; with `fps`, t in eighths of a second."""
        grid = self.grid(frames, height, width)
        coords = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float32)
        if fps is not None:
            coords[:, 0] *= self.block[0] / fps * 8
        return coords


def patchify(latents, patch: Grid):
    """[..., t, y, x, C] → tokens [..., t'·y'·x', pt·py·px·C], t-major. NumPy or JAX arrays."""
    *lead, t, y, x, c = latents.shape
    pt, py, px = patch
    n = len(lead)
    cut = latents.reshape(*lead, t // pt, pt, y // py, py, x // px, px, c)
    cut = cut.transpose(*range(n), *(n + i for i in (0, 2, 4, 1, 3, 5, 6)))
    return cut.reshape(*lead, (t // pt) * (y // py) * (x // px), pt * py * px * c)


def unpatchify(tokens, grid: Grid, patch: Grid):
    """Inverse of `patchify`; `grid` is the token grid (t', y', x')."""
    *lead, _, features = tokens.shape
    pt, py, px = patch
    n = len(lead)
    c = features // (pt * py * px)
    cut = tokens.reshape(*lead, *grid, pt, py, px, c)
    cut = cut.transpose(*range(n), *(n + i for i in (0, 3, 1, 4, 2, 5, 6)))
    return cut.reshape(*lead, grid[0] * pt, grid[1] * py, grid[2] * px, c)


def to_blocks(video, geometry: Geometry):
    """Cuts a clip into the block of pixels that each token covers.

    The first frame stands `stride[0]` times in its block, so all blocks have one size.

    Args:
      video: [..., T, H, W, 3] of any dtype, NumPy or JAX, of a size that `Geometry.fit` returned.

    Returns:
      [..., tokens, D]: t-major tokens; D = latents a token · stride_t · stride_y · stride_x · 3, in that order.
    """
    xp = video.__array_namespace__()
    first, rest = video[..., :1, :, :, :], video[..., 1:, :, :, :]
    video = xp.concatenate([xp.repeat(first, geometry.stride[0], axis=-4), rest], axis=-4)
    *lead, frames, height, width, _ = video.shape
    latents = patchify(video, geometry.stride)  # [..., latents, st·sy·sx·3]
    t, y, x = (frames // geometry.stride[0], height // geometry.stride[1], width // geometry.stride[2])
    return patchify(latents.reshape(*lead, t, y, x, latents.shape[-1]), geometry.patch)


def from_blocks(blocks, grid: Grid, geometry: Geometry):
    """Inverse of `to_blocks` on float arrays; the first frame is the mean of the copies that its block holds.

    Args:
      blocks: [..., tokens, D] float.
      grid: token grid (t, y, x).
    """
    xp = blocks.__array_namespace__()
    *lead, _, _ = blocks.shape
    latents = unpatchify(blocks, grid, geometry.patch)
    latent_grid = latents.shape[-4:-1]
    video = unpatchify(latents.reshape(*lead, math.prod(latent_grid), -1), latent_grid, geometry.stride)
    copies, rest = video[..., : geometry.stride[0], :, :, :], video[..., geometry.stride[0] :, :, :, :]
    return xp.concatenate([copies.mean(axis=-4, keepdims=True), rest], axis=-4)
