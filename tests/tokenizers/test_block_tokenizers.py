"""patch and wavelet: exact, causal, and the same on rows as on videos."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.geometry import patchify, to_blocks
from vidgen.tokenizers import base


def make(name, stride=(4, 8, 8), patch=(1, 1, 1)):
    c = configs.base().tokenizer
    c.update(name=name, stride=stride, patch=patch, mean=-0.25, std=0.5)
    return base.from_config(c)


def video(frames, height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, frames, height, width, 3), np.uint8)


def pixels(u8):
    return jnp.asarray(u8, jnp.float32) / 127.5 - 1


@pytest.mark.parametrize("name", ["patch", "wavelet"])
@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("stride", [(4, 8, 8), (2, 4, 4)])
def test_round_trip(name, frames, stride):
    tokenizer, x = make(name, stride), pixels(video(frames))
    latents = tokenizer.encode(x)
    assert latents.shape == (1, *tokenizer.geometry.latent_grid(frames, 16, 24), tokenizer.geometry.channels)
    back = np.asarray(tokenizer.decode(latents))
    np.testing.assert_allclose(back, x, atol=2e-6)
    # Exact where it counts: the same bytes.
    np.testing.assert_array_equal(np.round((back + 1) * 127.5).astype(np.uint8), video(frames))


@pytest.mark.parametrize("name", ["patch", "wavelet"])
def test_blocks_of_the_feed_become_the_tokens_of_encode(name):
    tokenizer = make(name, (4, 4, 4), (1, 2, 2))
    tokens = tokenizer.encode_blocks(jnp.asarray(to_blocks(video(5), tokenizer.geometry)))
    latents = tokenizer.encode(pixels(video(5)))
    np.testing.assert_allclose(tokens, patchify(latents, (1, 2, 2)), atol=1e-5)


@pytest.mark.parametrize("name", ["patch", "wavelet"])
def test_causal_in_time(name):
    tokenizer, x = make(name), pixels(video(9))
    changed = x.at[:, 5:].set(0.0)
    a, b = tokenizer.encode(x), tokenizer.encode(changed)
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.abs(a[:, 2] - b[:, 2]).max() > 0.1
    np.testing.assert_array_equal(tokenizer.encode(x[:, :1]), a[:, :1])  # an image is one frame


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_haar_is_orthonormal_and_a_constant_is_one_coefficient(size):
    matrix = base.haar_matrix(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(matrix @ np.ones(size), [size**0.5] + [0] * (size - 1), atol=1e-6)


def test_haar_matches_the_textbook():
    x = np.array([4.0, 6.0, 10.0, 12.0])
    np.testing.assert_allclose(base.haar_matrix(4) @ x, [16, -6, -(2**0.5), -(2**0.5)], rtol=1e-6)


def test_a_still_clip_has_no_motion_coefficients():
    tokenizer = make("wavelet")
    still = jnp.repeat(pixels(video(1)), 9, axis=1)
    values = tokenizer.encode(still) * 0.5 - 0.25
    by_time = np.asarray(values).reshape(*values.shape[:-1], 4, -1)
    assert np.abs(by_time[..., 1:, :]).max() < 1e-6 < np.abs(by_time[..., 0, :]).max()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "vqgan"}, "known are patch, wavelet"),
        ({"name": "wavelet", "stride": (3, 8, 8)}, "powers of two"),
        ({"stride": (4, 0, 8)}, "three numbers"),
        ({"patch": (1, 1)}, "three numbers"),
    ],
)
def test_bad_settings(change, says):
    c = configs.base().tokenizer
    c.unlock()
    c.update(change)
    with pytest.raises(ConfigError, match=says):
        base.from_config(c)


def test_a_size_that_does_not_cut_is_told():
    with pytest.raises(ValueError, match="nearest: \\(5, 16, 24\\)"):
        make("patch").encode(pixels(video(7, 17, 24)))
