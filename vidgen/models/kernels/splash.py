"""Splash attention, the Pallas kernel for TPUs that comes with JAX, told at run time which blocks it may skip.

The stock kernel skips blocks by two small arrays in scalar memory: `block_mask` (0 = skip) and `data_next` (the block
to fetch). JAX makes them from a static mask; here they come from the segments of a row, so that packed rows and windows
cost what they need. Which token sees which within a block is left to the kernel's segment ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from vidgen.models.kernels.blockwise import meeting
from vidgen.models.kernels.dense import NAMES, has_key, scaled

LANES = 128  # lengths and blocks are multiples of it
# The fused backward kernel computes scores once instead of twice, and holds a copy of dq for each block of keys.
COPIES = 2**30  # bytes that these may take
BLOCKS = 2**18  # that the two arrays can tell of, three bytes each, in 1 MiB of scalar memory
WIDEST = 2048  # keys of a block at most, by the memory of a core


def attend(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    block: int = 512,
    names: tuple[str, str] = NAMES,
    shared_keys: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Like `dense.attend`, in blocks of at most `block` queries and keys, a multiple of 128.

    Lengths are padded to multiples of 128. The kernel gives its output and its log-sum-exp one name, `names[0]`.

    Args:
      shared_keys: whether keys are others than the queries' own tokens, so that a query may have none.
      interpret: runs on any device, slowly: for tests.

    Returns: [B,H,S,D] in v's dtype.
    """
    length = q_BxHxSxD.shape[2]
    q = scaled(q_BxHxSxD)
    q, k, v = (_padded(x, 2) for x in (q, k_BxHxLxD, v_BxHxLxD))
    q_ids, k_ids = _padded(q_ids_BxS, 1), _padded(k_ids_BxL, 1)
    sizes, heads = block_sizes(q.shape, k.shape[2], q.dtype.itemsize, block)

    def row(args):
        return _row(*args, sizes=sizes, name=names[0], interpret=interpret)

    def grouped(x):  # [B,H,…] → [B · groups, heads, …]
        return x.reshape(-1, heads, *x.shape[2:])

    # A row at a time, since each has its own arrays in scalar memory, and some heads of it.
    ids = (jnp.repeat(i, q.shape[1] // heads, axis=0) for i in (q_ids, k_ids))
    out = jax.lax.map(row, (grouped(q), grouped(k), grouped(v), *ids)).reshape(q.shape)[:, :, :length]
    # A query that sees no key gets the mean of some values of the kernel, or NaN where its whole block was skipped.
    seen = has_key(q_ids_BxS, k_ids_BxL, shared_keys)
    return jnp.where(seen[:, None, :, None], out, 0).astype(v_BxHxLxD.dtype)


def block_sizes(q_shape: tuple[int, ...], keys: int, itemsize: int, block: int = 512) -> tuple[kernels.BlockSizes, int]:
    """(the blocks of the kernels, the heads that go through them at once).

    The widest blocks of keys that a core's memory has room for make the fewest copies of dq, and so few heads at once
    that these fit. Where a single head's don't, the backward pass is two kernels.

    Args:
      q_shape: [B,H,S,D]; S and `keys` are multiples of 128.
      itemsize: bytes of a number.
    """
    _, heads, queries, width = q_shape
    q, k = sides(queries, keys, block)
    wide = max((n for n in range(k, WIDEST + 1, k) if keys % n == 0), default=k)
    a_head = keys // wide * queries * width * itemsize
    together = max((n for n in range(1, heads + 1) if heads % n == 0 and n * a_head <= COPIES), default=0)
    sizes = kernels.BlockSizes(
        block_q=q,
        block_kv=k,
        block_q_dkv=q,
        block_kv_dkv=wide if together else k,
        block_kv_dkv_compute=k,
        block_q_dq=None if together else q,
        block_kv_dq=None if together else k,
        use_fused_bwd_kernel=together > 0,
    )
    return sizes, together or heads


def sides(queries: int, keys: int, block: int) -> tuple[int, int]:
    """Queries and keys in a block of scores: at most `block`, or more where so many blocks would be too many.

    Args:
      queries, keys: multiples of 128.
    """
    while True:
        q, k = divisor(queries, block), divisor(keys, block)
        if queries // q * (keys // k) <= BLOCKS or block >= max(queries, keys):
            return q, k
        block *= 2


def divisor(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that cuts `length` evenly."""
    return next(n for n in range(min(length, most) // LANES * LANES, 0, -LANES) if length % n == 0)


def _row(q_HxSxD, k_HxLxD, v_HxLxD, q_ids_S, k_ids_L, sizes: kernels.BlockSizes, name: str, interpret: bool):
    def info(q_block, k_block, along):
        meet = meeting(q_ids_S[None], k_ids_L[None], q_block, k_block)
        return MaskInfo(_fetched(meet, along), None, meet.astype(jnp.int8), None, None)

    kernel = kernels.SplashAttentionKernel(
        info(sizes.block_q, sizes.block_kv, -1),
        None if sizes.use_fused_bwd_kernel else info(sizes.block_q_dq, sizes.block_kv_dq, -1),
        info(sizes.block_q_dkv, sizes.block_kv_dkv, -2),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=name,
        mask_function=None,
        interpret=interpret,
    )
    return kernel(q_HxSxD, k_HxLxD, v_HxLxD, kernels.SegmentIds(q_ids_S, k_ids_L))


def _fetched(meet_1xNxM: jax.Array, along: int) -> jax.Array:
    """Which block lies in memory at each step along an axis: at a skipped one the last (or first) that is computed."""
    steps = jax.lax.broadcasted_iota(jnp.int32, meet_1xNxM.shape, meet_1xNxM.ndim + along)
    last = jax.lax.cummax(jnp.where(meet_1xNxM, steps, 0), axis=meet_1xNxM.ndim + along)
    fetched = jnp.maximum(last, jnp.argmax(meet_1xNxM, axis=along, keepdims=True).astype(jnp.int32))
    count = meet_1xNxM.shape[along]
    return fetched.astype(jnp.int8 if count <= 127 else jnp.int16 if count <= 32767 else jnp.int32)


def _padded(x: jax.Array, axis: int) -> jax.Array:
    more = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x


def fused(queries: int, keys: int, width: int, block: int = 512) -> bool:
    """Whether the backward pass of so many queries and keys of bfloat16, in heads of `width`, runs as one kernel."""
    queries, keys = (-(-n // LANES) * LANES for n in (queries, keys))
    return block_sizes((1, 1, queries, width), keys, 2, block)[0].use_fused_bwd_kernel
