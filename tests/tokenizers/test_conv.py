"""Convolutions against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vidgen.tokenizers import conv


def by_definition(x, kernel):
    """Valid in time, zeros around, as a sum over taps."""
    kt, kh, kw, _, f = kernel.shape
    x = np.pad(x, ((0, 0), (0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0))).astype(np.float64)
    b, t, h, w, _ = x.shape
    y = np.zeros((b, t - kt + 1, h - kh + 1, w - kw + 1, f))
    for i, j, k in np.ndindex(kt, kh, kw):
        y += x[:, i : i + y.shape[1], j : j + y.shape[2], k : k + y.shape[3]] @ kernel[i, j, k]
    return y


@pytest.mark.parametrize("window", [(3, 3, 3), (3, 1, 1), (1, 1, 1), (1, 3, 3)])
@pytest.mark.parametrize("channels", [5, 70])
def test_conv3d(window, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 6, 5, channels), np.float32)
    kernel = rng.standard_normal((*window, channels, 7), np.float32)
    expected = by_definition(x, kernel)
    np.testing.assert_allclose(conv.conv3d(x, kernel), expected, atol=1e-4 * np.abs(expected).max())
    # what other platforms run
    np.testing.assert_allclose(conv._whole(x, kernel), expected, atol=1e-4 * np.abs(expected).max())


def test_up2d_is_a_convolution_of_doubled_pixels():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 4, 6), np.float32)
    kernel = rng.standard_normal((3, 3, 6, 7), np.float32)
    doubled = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_allclose(conv.up2d(x, kernel), by_definition(doubled, kernel[None]), atol=1e-4)


def test_down2d_pads_behind():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 4, 5), np.float32)
    kernel = rng.standard_normal((3, 3, 5, 7), np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    expected = by_definition(padded, kernel[None])[:, :, 1::2, 1::2]
    np.testing.assert_allclose(conv.down2d(x, kernel), expected, atol=1e-4)


def test_pairs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 2, 3, 5), np.float32)
    kernel = rng.standard_normal((3, 1, 1, 5, 4), np.float32)
    np.testing.assert_allclose(conv.pairs(x, kernel), by_definition(x, kernel)[:, ::2], atol=1e-4)


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 3, 4, 4, 2), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 2, 3), np.float32))
    check_grads(lambda x, k: jnp.sin(conv.conv3d(x, k)), (x, kernel), 1, ["rev"], atol=0.02, rtol=0.02)
    check_grads(lambda x, k: jnp.sin(conv.up2d(x, k)), (x, kernel[0]), 1, ["rev"], atol=0.02, rtol=0.02)
