"""Encoding and decoding in time chunks: the same result as at once, in memory that does not grow with the duration.

A clip goes through in a first chunk of 1 + k·stride frames and further ones of k·stride, so that clips of all lengths
share a short list of shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.tokenizers.vae import CausalVAE

FRAMES = 4  # of pixels in a chunk, beside the first: more need more memory and are little faster


def encode(vae: CausalVAE, params: Any, video_BxTxHxWx3: Any, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """(mean, log variance) of the latents of whole clips, each [B,t,y,x,z] f32.

    Args:
      vae: the module.
      params: its parameters; where they lie decides where it is computed.
      video_BxTxHxWx3: in [-1, 1], or u8; 1 + k·stride frames, height and width multiples of the stride.
      frames: in a chunk; rounded down to whole latents, but one at least.

    Raises ValueError for sizes that don't fit, for integers other than u8, and for numbers that are not finite.
    """
    stride = vae.config.stride[0]
    pieces = split(video_BxTxHxWx3, stride, max(frames // stride, 1) * stride)
    mean, logvar = zip(*encode_chunks(vae, params, pieces), strict=True)
    return np.concatenate(mean, axis=1), np.concatenate(logvar, axis=1)


def decode(vae: CausalVAE, params: Any, latents_BxTxYxXxZ: Any, frames: int = FRAMES) -> np.ndarray:
    """Video [B,T,H,W,3] f32 around [-1, 1], not clipped, of the latents of whole clips; arguments as `encode`'s."""
    pieces = split(latents_BxTxYxXxZ, 1, max(frames // vae.config.stride[0], 1))
    return np.concatenate(list(decode_chunks(vae, params, pieces)), axis=1)


def encode_chunks(vae: CausalVAE, params: Any, chunks: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(mean, log variance) of each chunk [B,T,H,W,3] of clips that need never be in memory as a whole."""
    return _run(vae, params, chunks, "encode")


def decode_chunks(vae: CausalVAE, params: Any, chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """Video of each chunk of latents [B,t,y,x,z]."""
    return _run(vae, params, chunks, "decode")


def split(x: Any, stride: int, step: int) -> Iterator[Any]:
    """[B,T,…] in chunks of 1 + `step`, then `step` frames, the last as many as are left.

    Raises ValueError unless T is 1 + k·stride.
    """
    total = x.shape[1]
    if total < 1 or (total - 1) % stride:
        fitting = (max(total - 1, 0) // stride) * stride + 1
        raise ValueError(f"{total} frames; expected 1 + k·{stride}, such as {fitting} or {fitting + stride}")
    ends = [*range(1 + step, total, step), total]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield x[:, start:end]


def shapes(frames: int, stride: int, chunk: int = FRAMES) -> list[int]:
    """Frames of the distinct chunks that a clip of `frames` goes through in, the first chunk's first."""
    step = max(chunk // stride, 1) * stride
    sizes = [piece.shape[1] for piece in split(np.empty((1, frames)), stride, step)]
    return list(dict.fromkeys(sizes))


def _run(vae: CausalVAE, params: Any, chunks: Iterable[Any], method: str) -> Iterator[Any]:
    history, start = {}, True
    for chunk in chunks:
        chunk = np.asarray(chunk) if not isinstance(chunk, jax.Array) else chunk
        pixels = method == "encode" and chunk.dtype == np.uint8
        if not (pixels or jnp.issubdtype(chunk.dtype, jnp.floating)):
            raise ValueError(f"{method}: {chunk.dtype}; expected floats{' or uint8' if method == 'encode' else ''}")
        if not (pixels or bool(np.isfinite(chunk).all())):
            raise ValueError(f"{method}: expected finite numbers, found NaN or infinity")
        out, history = _chunk(vae, method, start, params, history, chunk)
        start = False
        yield jax.device_get(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _chunk(vae: CausalVAE, method: str, start: bool, params: Any, history: Any, x: jax.Array):
    if x.dtype == np.uint8:
        x = x / np.float32(127.5) - 1
    return vae.apply({"params": params, **history}, x, start, method=method, mutable=["history"])
