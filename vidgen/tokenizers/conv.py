"""The convolutions of the video VAE, channels last, in the form that the compiler is good at."""

from __future__ import annotations

import jax
import jax.numpy as jnp

DIMENSIONS = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}


def conv3d(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Valid in time, zeros around height and width: [B,T,H,W,C] * [kt,kh,kw,C,F] → [B,T-kt+1,H,W,F]; odd kh, kw."""
    if kernel.shape[1:3] == (1, 1):
        return stacked(x_BxTxHxWxC, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.platform_dependent(x_BxTxHxWxC, kernel, cpu=_by_frames, default=_whole)


def _whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
    pads = [(0, 0), *((size // 2, size // 2) for size in kernel.shape[1:3])]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), pads, dimension_numbers=DIMENSIONS[5])


def _by_frames(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As two-dimensional convolutions, in which XLA's CPU backend is two to nine times faster."""
    b, t, h, w, c = x.shape
    kt, kh, kw, _, f = kernel.shape
    t -= kt - 1
    pads = [(kh // 2, kh // 2), (kw // 2, kw // 2)]

    def convolve(frames, kernel):
        y = jax.lax.conv_general_dilated(
            frames.reshape(b * t, h, w, -1), kernel, (1, 1), pads, dimension_numbers=DIMENSIONS[4]
        )
        return y.reshape(b, t, h, w, f)

    if c < 64:  # narrow layers want one long sum of products
        return convolve(stacked(x, kt), jnp.moveaxis(kernel, 0, 2).reshape(kh, kw, kt * c, f))
    return sum(convolve(x[:, i : i + t], kernel[i]) for i in range(kt))


def stacked(x_BxTxHxWxC: jax.Array, frames: int) -> jax.Array:
    """Each frame with the `frames` - 1 after it, side by side in the channels: [B,T-frames+1,H,W,frames·C]."""
    t = x_BxTxHxWxC.shape[1] - frames + 1
    return jnp.concatenate([x_BxTxHxWxC[:, i : i + t] for i in range(frames)], axis=-1)


def pairs(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 2 in time, valid: frames (0,1,2), (2,3,4), … → [B,(T-1)/2,H,W,F]; kernel [3,1,1,C,F]."""
    before, middle, after = x_BxTxHxWxC[:, :-1:2], x_BxTxHxWxC[:, 1::2], x_BxTxHxWxC[:, 2::2]
    x = jnp.concatenate([before, middle, after], axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def down2d(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 2 in height and width of each frame, one row and column of zeros behind; kernel [3,3,C,F]."""
    b, t, h, w, c = x_BxTxHxWxC.shape
    frames = x_BxTxHxWxC.reshape(b * t, h, w, c)
    pads = [(0, 1), (0, 1)]
    y = jax.lax.conv_general_dilated(frames, kernel, (2, 2), pads, dimension_numbers=DIMENSIONS[4])
    return y.reshape(b, t, *y.shape[1:])


def up2d(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each pixel twice in height and width, then a 3×3 convolution with zeros around: [B,T,H,W,C] → [B,T,2H,2W,F].

    Computed at the small size: a 3×3 window over doubled pixels sees 2×2 of them, so four kernels of 2×2, sums of the
    given one's rows and columns, make the four pixels of each place in 4/9 of the products.
    """
    b, t, h, w, c = x_BxTxHxWxC.shape
    f = kernel.shape[-1]
    # Row 2i of the result sees rows i-1, i, i of the small frame, and row 2i+1 rows i, i, i+1.
    fold = jnp.asarray([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)  # [phase, small row, row]
    small = jnp.einsum("pay,qbx,yxcf->abcpqf", fold, fold, kernel, precision="highest").reshape(2, 2, c, 4 * f)
    frames = x_BxTxHxWxC.reshape(b * t, h, w, c)
    y = jax.lax.platform_dependent(frames, small, cpu=_by_corners, default=_around)
    y = y.reshape(b * t, h + 1, w + 1, 2, 2, f)
    rows = [jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in (0, 1)], axis=3) for p in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, t, 2 * h, 2 * w, f)


def _around(frames: jax.Array, kernel: jax.Array) -> jax.Array:
    """2×2 convolution with zeros around: [N,H,W,C] * [2,2,C,F] → [N,H+1,W+1,F]."""
    return jax.lax.conv_general_dilated(frames, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=DIMENSIONS[4])


def _by_corners(frames: jax.Array, kernel: jax.Array) -> jax.Array:
    """As one matrix product: XLA's CPU backend is slow at the gradient of such a kernel."""
    n, h, w, c = frames.shape
    padded = jnp.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = [padded[:, i : i + h + 1, j : j + w + 1] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1) @ kernel.reshape(4 * c, -1)
