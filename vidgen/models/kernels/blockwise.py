"""Flash attention in plain XLA: memory linear in the length, blocks of scores that no query needs never computed.

The method of Dao et al. (arXiv:2205.14135): the softmax is carried from block to block with its running maximum and
sum, and the backward pass computes each block of scores again from the log-sum-exp. One loop runs over the list of
(row, query block, key block) that share an id; the list is made at run time, so packed rows and windows cost what they
need. It runs on every device, in any shape, and it alone gives the ring a log-sum-exp that it can merge.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vidgen.models.kernels.dense import MASKED, NAMES, NONE, sees

Arrays = tuple[jax.Array, ...]
Ids = jax.Array | np.ndarray


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    block: int = 512,
    names: tuple[str, str] = NAMES,
) -> jax.Array:
    """Like `dense.attend`, in blocks of at most `block` queries and keys. Returns [B,H,S,D] in v's dtype."""
    return forward(q_BxHxSxD, k_BxHxLxD, v_BxHxLxD, q_ids_BxS, k_ids_BxL, block)[0].astype(v_BxHxLxD.dtype)


def _attend_forward(q, k, v, q_ids, k_ids, block, names):
    out, lse = forward(q, k, v, q_ids, k_ids, block)
    # Named here, so that a policy that saves these two names leaves the backward pass no forward loop to run again.
    out, lse = checkpoint_name(out.astype(v.dtype), names[0]), checkpoint_name(lse, names[1])
    return out, (q, k, v, q_ids, k_ids, out, lse)


def _attend_backward(block, names, saved, dout):
    grads = backward(*saved, dout, block)
    return *(g.astype(x.dtype) for g, x in zip(grads, saved[:3], strict=True)), None, None


attend.defvjp(_attend_forward, _attend_backward)


def forward(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    block: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """(output [B,H,S,D] f32, log-sum-exp of scores [B,H,S] f32): zeros and `dense.NONE` where a query sees no key."""
    length, scale = q_BxHxSxD.shape[2], q_BxHxSxD.shape[3] ** -0.5
    q, q_ids = _padded((q_BxHxSxD, q_ids_BxS), block)
    k, v, k_ids = _padded((k_BxHxLxD, v_BxHxLxD, k_ids_BxL), block)
    sizes = block_size(length, block), block_size(k_BxHxLxD.shape[2], block)
    pairs, count = active(q_ids, k_ids, *sizes)

    def visit(n, carry):
        out, most, total = carry
        at_q, at_k = _places(pairs, n, sizes)
        part = functools.partial(_cut, at=at_q, size=sizes[0])
        s = _scores(part(q), _cut(k, at_k, sizes[1]), part(q_ids), _cut(k_ids, at_k, sizes[1]), scale)
        before = part(most)
        now = jnp.maximum(before, jnp.max(s, axis=-1))
        p, keep = jnp.exp(s - now[..., None]), jnp.exp(before - now)
        new = part(out) * keep[..., None] + _dot("hqk,hkd->hqd", p.astype(v.dtype), _cut(v, at_k, sizes[1]))
        return (
            _put(out, new, at_q),
            _put(most, now, at_q),
            _put(total, part(total) * keep + jnp.sum(p, axis=-1), at_q),
        )

    zeros = jnp.zeros(q.shape, jnp.float32)
    carry = zeros, jnp.full(q.shape[:3], NONE, jnp.float32), zeros[..., 0]
    out, most, total = jax.lax.fori_loop(0, count, visit, carry)
    total = jnp.maximum(total, 1e-30)
    return (out / total[..., None])[:, :, :length], (most + jnp.log(total))[:, :, :length]


def backward(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    out_BxHxSxD: jax.Array,
    lse_BxHxS: jax.Array,
    dout_BxHxSxD: jax.Array,
    block: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv) in f32, of these keys, where `out` and `lse` may be those of more keys than these."""
    lengths, scale = (q_BxHxSxD.shape[2], k_BxHxLxD.shape[2]), q_BxHxSxD.shape[3] ** -0.5
    delta = jnp.sum(dout_BxHxSxD.astype(jnp.float32) * out_BxHxSxD.astype(jnp.float32), axis=-1)
    q, q_ids, dout, lse, delta = _padded((q_BxHxSxD, q_ids_BxS, dout_BxHxSxD, lse_BxHxS, delta), block)
    k, v, k_ids = _padded((k_BxHxLxD, v_BxHxLxD, k_ids_BxL), block)
    sizes = tuple(block_size(n, block) for n in lengths)
    pairs, count = active(q_ids, k_ids, *sizes)

    def visit(n, carry):
        dq, dk, dv = carry
        at_q, at_k = _places(pairs, n, sizes)
        q_, q_ids_, dout_, lse_, delta_ = (_cut(x, at_q, sizes[0]) for x in (q, q_ids, dout, lse, delta))
        k_, v_, k_ids_ = (_cut(x, at_k, sizes[1]) for x in (k, v, k_ids))
        p = jnp.exp(_scores(q_, k_, q_ids_, k_ids_, scale) - lse_[..., None])
        ds = p * (_dot("hqd,hkd->hqk", dout_, v_) - delta_[..., None]) * scale
        p, ds = p.astype(dout.dtype), ds.astype(q.dtype)
        return (
            _put(dq, _cut(dq, at_q, sizes[0]) + _dot("hqk,hkd->hqd", ds, k_), at_q),
            _put(dk, _cut(dk, at_k, sizes[1]) + _dot("hqk,hqd->hkd", ds, q_), at_k),
            _put(dv, _cut(dv, at_k, sizes[1]) + _dot("hqk,hqd->hkd", p, dout_), at_k),
        )

    dq, dk, dv = jax.lax.fori_loop(0, count, visit, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    return dq[:, :, : lengths[0]], dk[:, :, : lengths[1]], dv[:, :, : lengths[1]]


def active(q_ids_BxS: jax.Array, k_ids_BxL: jax.Array, q_block: int, k_block: int) -> tuple[jax.Array, jax.Array]:
    """([3, all pairs] i32: row, query block, key block; how many of them, at the front, may share an id)."""
    meet = meeting(q_ids_BxS, k_ids_BxL, q_block, k_block)
    return jnp.stack(jnp.nonzero(meet, size=meet.size, fill_value=0)).astype(jnp.int32), jnp.sum(meet)


def meeting(q_ids_BxS: Ids, k_ids_BxL: Ids, q_block: int, k_block: int) -> Ids:
    """Which blocks may share an id, [B,S / q_block,L / k_block] bool: those whose ranges of ids overlap."""
    (q_low, q_high), (k_low, k_high) = _ranges(q_ids_BxS, q_block), _ranges(k_ids_BxL, k_block)
    return (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])


def _ranges(ids_BxL: Ids, block: int) -> tuple[Ids, Ids]:
    """Least and largest id in each block, [B,N]; padding counts for neither, and a block of it meets no other."""
    xp = np if isinstance(ids_BxL, np.ndarray) else jnp
    ids, top = ids_BxL.reshape(ids_BxL.shape[0], -1, block), np.iinfo(np.int32).max
    return xp.where(ids == 0, top, ids).min(axis=-1), xp.where(ids == 0, -top, ids).max(axis=-1)


def block_size(length: int, block: int) -> int:
    """Side of the blocks that cut `length` evenly, as few as `block` allows, a multiple of 8 or the length itself."""
    count = -(-length // block)
    return length if count == 1 else -(-length // count // 8) * 8


def _padded(arrays: Arrays, block: int) -> Arrays:
    """Token axis (the third; of ids the second) filled with zeros up to whole blocks."""

    def pad(x):
        axis = min(2, x.ndim - 1)
        more = -x.shape[axis] % block_size(x.shape[axis], block)
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x

    return tuple(map(pad, arrays))


def _places(pairs: jax.Array, n: jax.Array, sizes: tuple[int, int]) -> tuple[Arrays, Arrays]:
    """(row, first query), (row, first key) of the n-th pair."""
    row, i, j = pairs[:, n]
    return (row, i * sizes[0]), (row, j * sizes[1])


def _cut(x: jax.Array, at: Arrays, size: int) -> jax.Array:
    """`size` tokens of one row: [B,H,S,…] → [H,size,…], [B,S] → [size]."""
    row, first = at
    if x.ndim == 2:
        return jax.lax.dynamic_slice(x, (row, first), (1, size))[0]
    rest = x.shape[3:]
    return jax.lax.dynamic_slice(x, (row, 0, first, *(0,) * len(rest)), (1, x.shape[1], size, *rest))[0]


def _put(x: jax.Array, part: jax.Array, at: Arrays) -> jax.Array:
    """Inverse of `_cut`."""
    return jax.lax.dynamic_update_slice(x, part[None], (at[0], 0, at[1], *(0,) * (x.ndim - 3)))


def _scores(q: jax.Array, k: jax.Array, q_ids: jax.Array, k_ids: jax.Array, scale: float) -> jax.Array:
    s = _dot("hqd,hkd->hqk", q, k) * scale
    return jnp.where(sees(q_ids[:, None], k_ids[None, :]), s, MASKED)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
