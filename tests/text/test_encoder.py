"""The byte encoder: a caption means the same wherever it is packed."""

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.data.text import encode_text
from vidgen.text.encoder import ByteEncoder, ngram_hashes

A, B = encode_text("a red circle", 40), encode_text("红色的圆", 40)


def packed(*captions):
    ids = np.concatenate([*captions, np.zeros(4, np.int32)])[None]
    segment = np.concatenate([np.full(len(c), i + 1) for i, c in enumerate(captions)] + [np.zeros(4)])[None]
    return jnp.asarray(ids), jnp.asarray(segment, jnp.int32)


def test_packed_equals_alone():
    net = ByteEncoder(width=16, layers=2, heads=2)
    params = net.init(jax.random.key(0), *packed(A, B))
    both = net.apply(params, *packed(A, B))
    np.testing.assert_allclose(both[0, len(A) : len(A) + len(B)], net.apply(params, *packed(B))[0, : len(B)], atol=1e-5)
    np.testing.assert_allclose(both[0, : len(A)], net.apply(params, *packed(A))[0, : len(A)], atol=1e-5)


def test_ngrams_see_the_last_n_bytes_of_their_own_caption_only():
    ids, segment = packed(A, B)
    hashes = np.asarray(ngram_hashes(ids, segment, 3, 1 << 20))[0]
    alone = np.asarray(ngram_hashes(*packed(B), 3, 1 << 20))[0]
    np.testing.assert_array_equal(hashes[len(A) : len(A) + len(B)], alone[: len(B)])
    twice = encode_text("red red", 40)
    same = np.asarray(ngram_hashes(*packed(twice), 3, 1 << 20))[0]
    assert same[3] == same[7] and same[2] != same[6]  # "red" ends at both; " re" is not "␂re"


def test_hashes_spread_over_the_buckets():
    ids = jnp.asarray(np.random.default_rng(0).integers(2, 258, (1, 4000)), jnp.int32)
    hashes = np.asarray(ngram_hashes(ids, jnp.ones_like(ids), 4, 256))[0]
    counts = np.bincount(hashes, minlength=256)
    assert hashes.min() >= 0 and hashes.max() < 256
    assert counts.max() < 3 * 4000 / 256
