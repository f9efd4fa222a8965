"""The I3D network (Carreira and Zisserman, arXiv:1705.07750), trained on Kinetics-400: what FVD sees clips through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vidgen import perceptual

FEATURES = 400
SIDE = 224  # pixels; clips are resized to it
LEAST = 9  # frames: fewer leave nothing for the last pooling
# What follows the stem: pooling windows and strides, and inception modules.
_TRUNK = (
    "Mixed_3b",
    "Mixed_3c",
    ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b",
    "Mixed_5c",
)


def load() -> dict[str, Any]:
    """The weights, f32, batch norms folded in. Raises ConfigError where the extra [perceptual] is not installed."""
    return perceptual.load("i3d")


def logits(params: Mapping[str, Any], video_BxTx224x224x3: jax.Array) -> jax.Array:
    """Scores of the 400 classes, before the softmax: [B,400] f32.

    Args:
      params: from `load`.
      video_BxTx224x224x3: in [-1, 1]; at least 9 frames.
    """
    chex.assert_shape(video_BxTx224x224x3, (None, None, SIDE, SIDE, 3))
    if video_BxTx224x224x3.shape[1] < LEAST:
        raise ValueError(f"I3D of {video_BxTx224x224x3.shape[1]} frames: expected {LEAST} or more")
    x = _unit(params["Conv3d_1a_7x7"], video_BxTx224x224x3.astype(jnp.float32), (2, 2, 2))
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    x = _unit(params["Conv3d_2b_1x1"], x)
    x = _unit(params["Conv3d_2c_3x3"], x)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    for part in _TRUNK:
        x = _inception(params[part], x) if isinstance(part, str) else _pool(x, *part)
    head = params["Logits"]["Conv3d_0c_1x1"]
    # Averages over two frames and all places, then over time; the last convolution is linear and comes after.
    x = x.mean(axis=(2, 3))
    x = ((x[:, :-1] + x[:, 1:]) / 2).mean(axis=1)
    return x @ jnp.asarray(head["kernel"]).reshape(-1, FEATURES) + head["bias"]


def features(params: Mapping[str, Any], video_BxTxHxWx3: jax.Array) -> jax.Array:
    """Logits of u8 clips of any size: [B,400] f32.

    They are resized to 224×224, whatever the aspect: bilinearly, and smoothed where that shrinks.
    """
    batch, frames = video_BxTxHxWx3.shape[:2]
    video = video_BxTxHxWx3.astype(jnp.float32) / 127.5 - 1
    return logits(params, jax.image.resize(video, (batch, frames, SIDE, SIDE, 3), "bilinear"))


def _inception(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    wide, wider = params["Branch_1"], params["Branch_2"]
    return jnp.concatenate(
        [
            _unit(params["Branch_0"]["Conv3d_0a_1x1"], x),
            _unit(wide["Conv3d_0b_3x3"], _unit(wide["Conv3d_0a_1x1"], x)),
            _unit(wider["Conv3d_0b_3x3"], _unit(wider["Conv3d_0a_1x1"], x)),
            _unit(params["Branch_3"]["Conv3d_0b_1x1"], _pool(x, (3, 3, 3), (1, 1, 1))),
        ],
        axis=-1,
    )


def _unit(params: Mapping[str, Any], x: jax.Array, stride=(1, 1, 1)) -> jax.Array:
    """Convolution, batch norm (folded into it) and ReLU."""
    kernel = jnp.asarray(params["kernel"])
    x = lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=("NTHWC", "THWIO", "NTHWC"))
    return jax.nn.relu(x + params["bias"])


def _pool(x: jax.Array, window, stride) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
