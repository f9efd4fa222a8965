"""cuDNN's flash attention, for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

It takes the lengths of one segment a row, or a mask of S x L numbers. Its layout for packed rows is not among what JAX
makes public, and asks the local device for its generation, so that no plan could be made without a GPU. Hence the mask
is for rows that are short enough, and longer packed rows go to the blockwise kernel: see `attend.from_config`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidgen.models.kernels.dense import NAMES, has_key, sees


def attend(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    names: tuple[str, str] = NAMES,
    shared_keys: bool = False,
    one_clip: bool = False,
) -> jax.Array:
    """Like `dense.attend`, in bfloat16 or float16, head widths up to 128 that are multiples of 8.

    The output gets its name; the log-sum-exp is the library's own and has none, so that a policy of names runs the
    forward kernel again in the backward pass.

    Args:
      shared_keys: whether keys are others than the queries' own tokens, so that a query may have none.
      one_clip: ids are equal from the start of a row up to the padding, so that lengths say all.

    Returns: [B,H,S,D] in v's dtype.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxHxSxD, k_BxHxLxD, v_BxHxLxD))
    if one_clip:
        lengths = [jnp.sum(ids != 0, axis=-1, dtype=jnp.int32) for ids in (q_ids_BxS, k_ids_BxL)]
        seen = {"query_seq_lengths": lengths[0], "key_value_seq_lengths": lengths[1]}
    else:
        seen = {"mask": sees(q_ids_BxS[:, None, :, None], k_ids_BxL[:, None, None, :])}
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen).swapaxes(1, 2)
    out = jnp.where(has_key(q_ids_BxS, k_ids_BxL, shared_keys)[:, None, :, None], out, 0)
    return checkpoint_name(out, names[0])
