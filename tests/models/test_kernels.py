import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.models.kernels import blockwise, cudnn, dense, splash

F32 = jnp.float32


def rows(queries, keys, width=8, heads=2, dtype=F32, seed=0):
    r = np.random.default_rng(seed)
    shapes = [(2, heads, queries, width)] + 2 * [(2, heads, keys, width)] + [(2, heads, queries, width)]
    return [jnp.asarray(r.normal(size=s), dtype) for s in shapes]


def packed(*rows_of_runs):
    """Ids of rows, each from (id, tokens) runs."""
    return jnp.asarray([np.concatenate([np.full(n, i) for i, n in runs]) for runs in rows_of_runs], jnp.int32)


def out_and_grads(kernel, q, k, v, g, q_ids, k_ids):
    """[out, dq, dk, dv]."""

    def loss(q, k, v):
        out = kernel(q, k, v, q_ids, k_ids)
        return jnp.sum((out * g).astype(F32)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *grads]


def assert_close(found, wanted, rtol=1e-5):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = float(jnp.max(jnp.abs(b.astype(F32))))
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=rtol * scale, rtol=0)


def by_hand(q, k, v, q_ids, k_ids):
    """Token by token, in numpy."""
    q, k, v, q_ids, k_ids = map(np.asarray, (q, k, v, q_ids, k_ids))
    out = np.zeros(q.shape, np.float32)
    for b, h, s in np.ndindex(q.shape[:3]):
        mine = (k_ids[b] == q_ids[b, s]) & (q_ids[b, s] != 0)
        if mine.any():
            scores = k[b, h, mine] @ q[b, h, s] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, h, s] = weights @ v[b, h, mine] / weights.sum()
    return out


SELF = packed([(1, 20), (2, 45), (0, 5)], [(3, 70)])
TEXT = packed([(1, 9), (0, 28)], [(2, 5), (3, 30), (0, 2)])  # the second clip of the first row has no text


@pytest.mark.parametrize("keys", [SELF, TEXT], ids=["self", "cross"])
def test_dense_is_softmax_over_the_keys_of_the_same_id(keys):
    q, k, v, _ = rows(70, keys.shape[1])
    np.testing.assert_allclose(jax.jit(dense.attend)(q, k, v, SELF, keys), by_hand(q, k, v, SELF, keys), atol=2e-6)


@pytest.mark.parametrize("keys", [SELF, TEXT], ids=["self", "cross"])
def test_blockwise_equals_dense_where_blocks_do_not_divide_the_lengths(keys):
    arrays = rows(70, keys.shape[1])
    kernel = functools.partial(blockwise.attend, block=16)
    assert_close(out_and_grads(kernel, *arrays, SELF, keys), out_and_grads(dense.attend, *arrays, SELF, keys))


def test_blockwise_in_bfloat16_accumulates_in_float32():
    q, k, v, g = rows(64, 64, dtype=jnp.bfloat16)
    ids = packed([(1, 64)], [(1, 30), (2, 34)])
    found = out_and_grads(functools.partial(blockwise.attend, block=8), q, k, v, g, ids, ids)
    exact = out_and_grads(dense.attend, *(x.astype(F32) for x in (q, k, v, g)), ids, ids)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_close([x.astype(F32) for x in found], exact, rtol=1e-2)


@pytest.mark.parametrize("kernel", [dense.attend, functools.partial(blockwise.attend, block=16)])
def test_padding_gets_zeros_and_gives_no_gradient(kernel):
    out, *grads = out_and_grads(kernel, *rows(70, 70), SELF, SELF)
    for x in (out, *grads):
        assert not np.any(np.asarray(x)[0, :, 65:])
        assert np.any(np.asarray(x)[0, :, :65])


def test_scores_far_apart_stay_finite():
    q, k, v, g = rows(32, 32)
    ids = packed([(1, 32)], [(1, 32)])
    q = q * 1e3
    for x in out_and_grads(functools.partial(blockwise.attend, block=8), q, k, v, g, ids, ids):
        assert np.all(np.isfinite(x))


def test_log_sum_exp_is_that_of_the_scores():
    q, k, v, _ = rows(16, 16)
    ids = packed([(1, 16)], [(1, 12), (0, 4)])
    _, lse = jax.jit(blockwise.forward, static_argnums=5)(q, k, v, ids, ids, 8)
    scores = np.einsum("bhsd,bhld->bhsl", q, k) / np.sqrt(8)
    np.testing.assert_allclose(lse[0], np.log(np.exp(scores[0]).sum(-1)), rtol=1e-5)
    assert np.all(np.asarray(lse)[1, :, 12:] <= dense.NONE)


@pytest.mark.parametrize("name", ["blockwise", "splash"])
def test_blocks_that_share_no_id_are_not_computed(name, monkeypatch):
    """NaN among the values of one clip would come out of every block that is computed, as 0 x NaN."""
    if name == "blockwise":
        kernel, size = functools.partial(blockwise.attend, block=16), 16
    else:
        monkeypatch.setattr(splash, "WIDEST", 128)  # else the backward pass takes both clips' keys at once
        kernel, size = functools.partial(splash.attend, block=128, interpret=True), 128
    q, k, v, g = rows(4 * size, 4 * size)
    ids = packed([(1, 2 * size), (2, 2 * size)], [(1, 4 * size)])
    poisoned = v.at[0, :, 2 * size :].set(jnp.nan)
    assert np.all(np.isnan(jax.jit(dense.attend)(q, k, poisoned, ids, ids)[0, :, : 2 * size]))
    out, dq, dk, dv = out_and_grads(kernel, q, k, poisoned, g, ids, ids)
    clean = out_and_grads(kernel, q, k, v, g, ids, ids)
    for found, wanted in zip((out, dq, dk, dv), clean, strict=True):
        np.testing.assert_array_equal(found[0, :, : 2 * size], wanted[0, :, : 2 * size])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_the_list_of_blocks_holds_each_pair_with_overlapping_ids_once():
    ids = np.asarray(packed([(1, 10), (2, 10), (0, 12)], [(1, 4), (2, 4), (3, 4), (4, 4), (5, 16)]))
    pairs, count = blockwise.active(jnp.asarray(ids), jnp.asarray(ids), 8, 4)
    wanted = []
    for b, i, j in np.ndindex(2, 4, 8):
        q, k = ids[b, 8 * i : 8 * i + 8], ids[b, 4 * j : 4 * j + 4]
        q, k = q[q > 0], k[k > 0]
        if q.size and k.size and q.min() <= k.max() and k.min() <= q.max():
            wanted.append((b, i, j))
    assert [tuple(p) for p in np.asarray(pairs).T[:count].tolist()] == wanted
    np.testing.assert_array_equal(
        blockwise.meeting(ids, ids, 8, 4), blockwise.meeting(jnp.asarray(ids), jnp.asarray(ids), 8, 4)
    )


@pytest.mark.parametrize("length, block, wanted", [(64, 64, 64), (70, 64, 40), (37, 64, 37), (1000, 256, 256)])
def test_blocks_cut_a_length_evenly(length, block, wanted):
    assert blockwise.block_size(length, block) == wanted


def loops(jaxpr):
    """While loops in a jaxpr and in all that it holds."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "while"
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            count += loops(inner) if hasattr(inner, "eqns") else 0
    return count


def test_a_policy_that_saves_the_names_leaves_no_forward_loop_in_the_backward_pass():
    q, k, v, _ = rows(32, 32)
    ids = packed([(1, 32)], [(1, 32)])

    def grad(policy):
        def f(q, k, v):
            return jnp.sum(jnp.sin(blockwise.attend(jnp.sin(q), k, v, ids, ids, 8)))

        return jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(q, k, v).jaxpr

    names = jax.checkpoint_policies.save_only_these_names
    assert loops(grad(names(*dense.NAMES))) == 2  # forward, backward
    assert loops(grad(names(dense.NAMES[0]))) == 3  # the log-sum-exp is needed too
    assert loops(grad(None)) == 3


# Bytes: a head's copies of dq are 16 KiB here.
@pytest.mark.parametrize("copies", [splash.COPIES, 2**14, 0], ids=["at once", "a head at a time", "two kernels"])
def test_splash_equals_dense_for_packed_rows_and_for_text(copies, monkeypatch):
    monkeypatch.setattr(splash, "COPIES", copies)
    video = packed([(1, 100), (2, 100), (0, 56)], [(1, 90), (2, 166)])
    text = packed([(1, 10), (3, 10), (0, 80)], [(1, 40), (2, 60)])
    for keys in (video, text) if copies == 2**14 else (video,):
        arrays = rows(256, keys.shape[1], width=16)
        kernel = functools.partial(splash.attend, block=128, shared_keys=keys is text, interpret=True)
        assert_close(out_and_grads(kernel, *arrays, video, keys), out_and_grads(dense.attend, *arrays, video, keys))


def test_splash_takes_so_many_heads_at_once_that_the_copies_of_dq_fit():
    sizes, heads = splash.block_sizes((1, 4, 1280, 128), 1280, 2)
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_dkv_compute, heads) == (256, 256, 256, 4)
    assert sizes.use_fused_bwd_kernel and 1280 % sizes.block_kv_dkv == 0
    sizes, heads = splash.block_sizes((1, 32, 7680, 128), 61440, 2)
    assert sizes.use_fused_bwd_kernel and 32 % heads == 0 and heads < 32
    copies = 61440 // sizes.block_kv_dkv * 7680 * 128 * 2
    assert heads * copies <= splash.COPIES < 2 * heads * copies
    sizes, heads = splash.block_sizes((1, 2, 245760, 128), 245760, 2)
    assert not sizes.use_fused_bwd_kernel and (sizes.block_q_dq, sizes.block_kv_dq, heads) == (512, 512, 2)


def test_cudnn_is_told_lengths_or_a_mask(monkeypatch):
    """The library's own XLA form stands in for the kernel, which only a GPU runs."""
    calls, real = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        calls.append(set(kwargs))
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    one = packed([(1, 50), (0, 20)], [(1, 70)])
    text = packed([(1, 9), (0, 28)], [(1, 30), (0, 7)])
    for q_ids, k_ids, one_clip in ((SELF, SELF, False), (SELF, TEXT, False), (one, one, True), (one, text, True)):
        arrays = rows(70, k_ids.shape[1])
        kernel = functools.partial(cudnn.attend, shared_keys=k_ids.shape != q_ids.shape, one_clip=one_clip)
        found = out_and_grads(kernel, *arrays, q_ids, k_ids)
        assert_close(found, out_and_grads(dense.attend, *arrays, q_ids, k_ids))
    assert calls[0] == {"mask"} and calls[-1] == {"query_seq_lengths", "key_value_seq_lengths"}


def test_splashs_blocks_grow_where_the_arrays_that_tell_of_them_would_not_fit():
    assert splash.sides(1280, 1280, 512) == (256, 256)  # the largest multiple of 128 that divides
    assert splash.sides(61440, 61440, 512) == (512, 512)
    q, k = splash.sides(163_840, 1_310_720, 512)  # a minute, an eighth of its queries
    assert (q, k) == (1024, 1024) and 163_840 // q * (1_310_720 // k) <= splash.BLOCKS
    assert splash.fused(75_776, 75_776, 128) and not splash.fused(163_840, 1_310_720, 128)
