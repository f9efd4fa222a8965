"""Local attention in 3D windows, as ids: tokens of one window have one id, and attention is to equal ids."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.config import ConfigError

Window = tuple[int, int, int]


def window_ids(segment_BxS: jax.Array, coords_BxSx3: jax.Array, window: Window, shift: bool) -> jax.Array:
    """Ids of non-overlapping windows of (t, y, x) tokens, as in Video Swin (Liu et al., arXiv:2106.13230).

    Where `shift`, the windows are moved by half their size, which leaves smaller ones at a clip's edges (nothing is
    rolled round). Ids grow with (segment, t, y, x), so that equal ones lie close together once tokens are sorted.
    Windows are laid from coordinate 0 on, so a clip has the same ones alone and in a packed row.

    Args:
      segment_BxS: i32, 0 = padding.
      coords_BxSx3: (t, y, x) in patches. Where t is in seconds x 8, so is the window's: 8 is one second.
      window: sizes in the units of the coordinates.

    Returns: [B,S] i32, 0 = padding, below 2^31 as long as segments x windows of a row are.
    """
    chex.assert_rank([segment_BxS, coords_BxSx3], [2, 3])
    size = jnp.asarray(window, jnp.float32)
    # A thousandth, since times in seconds are rounded, and a token on a border must not fall to either side by chance.
    place = jnp.floor((coords_BxSx3 + (size / 2 if shift else 0) + 1e-3) / size).astype(jnp.int32)
    real = (segment_BxS > 0)[..., None]
    most = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(real, place, most), axis=1, keepdims=True)
    count = jnp.maximum(jnp.max(jnp.where(real, place - first, 0), axis=1, keepdims=True) + 1, 1)
    ids = segment_BxS
    for axis in range(3):
        ids = ids * count[..., axis] + (place - first)[..., axis]
    return jnp.where(segment_BxS > 0, ids, 0)


def check(window: tuple[int, ...], full_every: int) -> None:
    """Raises ConfigError unless `config.model.window` is () or three sizes, and `full_every` makes sense."""
    if window and (len(window) != 3 or any(type(n) is not int or n < 1 for n in window)):
        raise ConfigError(f"config.model.window={window}: expected (t, y, x) in tokens, each 1 or more, or () for none")
    if full_every < 0:
        raise ConfigError(f"config.model.full_every={full_every}: expected 0 (never) or a number of layers")


def from_config(config: ConfigDict) -> Window | None:
    """`config.model.window`, or None where attention is full; raises ConfigError."""
    window = tuple(config.model.window)
    check(window, config.model.full_every)
    return window or None


Kernel = Callable[..., jax.Array]  # q, k, v, q_ids, k_ids → out


def sort_by_id(kernel: Kernel) -> Kernel:
    """`kernel` on tokens in the order of their ids, its output back in the order of the queries.

    Tokens of a clip lie frame by frame, so a window's are scattered over the frames that it spans, and a block holds
    some of many windows. Sorted, it holds few, and the kernel skips the rest: in a clip of 9 x 45 x 80 tokens with
    windows of 3 x 15 x 16 (2.2 % of all pairs), blocks of 512 compute 5.5 % of all pairs instead of 22 %.
    """

    def attend(q, k, v, q_ids, k_ids):
        q_order, k_order = jnp.argsort(q_ids, axis=-1), jnp.argsort(k_ids, axis=-1)
        q_back, k_back = jnp.argsort(q_order, axis=-1), jnp.argsort(k_order, axis=-1)
        q, k, v = _permute(q, q_order, q_back), _permute(k, k_order, k_back), _permute(v, k_order, k_back)
        ids = (jnp.take_along_axis(i, order, axis=-1) for i, order in ((q_ids, q_order), (k_ids, k_order)))
        return _permute(kernel(q, k, v, *ids), q_back, q_order)

    return attend


@jax.custom_vjp
def _permute(x_BxHxSxD: jax.Array, order_BxS: jax.Array, inverse_BxS: jax.Array) -> jax.Array:
    """Tokens in another order; its gradient is the inverse gather, where autodiff would scatter."""
    return jnp.take_along_axis(x_BxHxSxD, order_BxS[:, None, :, None], axis=2)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved, dout):
    order, inverse = saved
    return _permute(dout, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)
