"""The packed DiT: each clip of a row gets exactly what it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.text import encode_text
from vidgen.models import dit
from vidgen.models.attend import Attending, attend
from vidgen.text import encoder

P = 12
CLIPS = [((3, 2, 2), "a red circle"), ((1, 2, 3), "三角形"), ((2, 2, 2), "")]  # token grids and captions


def row(clips, tokens, texts):
    """One row that holds `clips` one after the other: (batch, noisy tokens, levels)."""
    rng = [np.random.default_rng(len(caption)) for _, caption in clips]
    coords, segment = np.zeros((1, tokens, 3), np.float32), np.zeros((1, tokens), np.int32)
    noisy = np.full((1, tokens, P), 7.0, np.float32)  # padding is not zero, so that a leak shows
    ids, text_segment = np.zeros((2, 1, texts), np.int32)
    levels = np.zeros((1, 4), np.float32)
    at = text_at = 0
    for k, ((grid, caption), r) in enumerate(zip(clips, rng, strict=True), start=1):
        n = int(np.prod(grid))
        coords[0, at : at + n] = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(n, 3)
        segment[0, at : at + n] = k
        noisy[0, at : at + n] = r.normal(size=(n, P))
        levels[0, k] = r.uniform(0.1, 0.9)
        text = encode_text(caption, 40)
        ids[0, text_at : text_at + len(text)], text_segment[0, text_at : text_at + len(text)] = text, k
        at, text_at = at + n, text_at + len(text)
    batch = TokenBatch(None, coords, segment, level=segment, context={"text": (ids, text_segment)})
    return batch, noisy, levels


def model(config, **changes):
    config.model.update(changes)
    return dit.from_config(config, P, encoder.from_config(config))


def lively(params):
    """adaLN-Zero starts as the identity, which proves nothing: gives every array some values."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def setup():
    from conftest import make_tiny

    net = model(make_tiny())
    batch, noisy, levels = row(CLIPS, 32, 48)
    params = lively(jax.jit(net.init)(jax.random.key(0), noisy, levels, batch)["params"])
    apply = jax.jit(lambda *inputs: net.apply({"params": params}, *inputs))
    return net, params, apply


def test_a_packed_row_gives_each_clip_what_it_gets_alone(setup):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    packed = apply(noisy, levels, batch)
    at = 0
    for k, clip in enumerate(CLIPS):
        n = int(np.prod(clip[0]))
        alone, noisy_alone, own = row([clip], n, 16)
        out = apply(noisy_alone, own, alone)
        assert np.abs(out).max() > 0.1
        assert np.abs(packed[0, at : at + n] - out[0]).max() < 1e-5, f"clip {k}"
        at += n


def test_a_clip_does_not_depend_on_its_neighbours_or_on_padding(setup):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    other = noisy.copy()
    other[0, 12:] = 100.0  # everything but the first clip, padding too
    a, b = apply(noisy, levels, batch), apply(other, levels, batch)
    np.testing.assert_array_equal(a[0, :12], b[0, :12])
    assert np.abs(a[0, 12:18] - b[0, 12:18]).max() > 0.1


@pytest.mark.parametrize("what", ["caption", "level", "place"])
def test_a_clip_depends_on_what_it_should(setup, what):
    _, _, apply = setup
    batch, noisy, levels = row(CLIPS[:1], 12, 16)
    before = apply(noisy, levels, batch)
    if what == "caption":
        batch = batch.replace(context={"text": row([(CLIPS[0][0], "a blue circle")], 12, 16)[0].context["text"]})
    elif what == "level":
        levels = levels + 0.05
    else:
        batch = batch.replace(coords=batch.coords * 1.5)
    assert np.abs(apply(noisy, levels, batch) - before).max() > 1e-3


def test_it_starts_as_zero(tiny):
    batch, noisy, levels = row(CLIPS, 32, 48)
    net = model(tiny)
    out, _ = jax.jit(net.init_with_output)(jax.random.key(0), noisy, levels, batch)
    assert not np.any(out)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"unroll": 1}])
def test_remat_and_unrolling_change_nothing(setup, tiny, changes):
    net, params, _ = setup
    batch, noisy, levels = row(CLIPS, 32, 48)

    def gradient(net):
        return jax.jit(jax.grad(lambda p: jnp.sum(net.apply({"params": p}, noisy, levels, batch)[0, :26] ** 2)))(params)

    for a, b in zip(jax.tree.leaves(gradient(net)), jax.tree.leaves(gradient(model(tiny, **changes))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max() + 1e-7)


def test_text_may_be_encoded_once(setup):
    net, params, apply = setup
    batch, noisy, levels = row(CLIPS, 32, 48)
    encoded = net.apply({"params": params}, batch, method="encode_context")
    assert encoded.context["text"][0].shape == (1, 48, 32)
    np.testing.assert_allclose(apply(noisy, levels, encoded), apply(noisy, levels, batch), atol=1e-6)


def test_attention_is_softmax_within_segments():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4)).astype(np.float32)
    segment = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    out = attend(*map(jnp.asarray, (q, k, v, segment, segment)), Attending())
    for s in range(5):
        same = segment[0] == segment[0, s]
        scores = np.exp(q[0, :, s] @ k[0, :, same].transpose(1, 2, 0) / 2)[np.arange(2), np.arange(2)]
        weights = scores / scores.sum(-1, keepdims=True)
        want = np.einsum("hl,lhd->hd", weights, v[0, :, same])
        np.testing.assert_allclose(out[0, :, s], want, atol=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 5}, "config.model.heads=5.*nearest: 4"),
        ({"remat": "some"}, "neither a preset"),
    ],
)
def test_bad_settings(tiny, change, says):
    with pytest.raises(ConfigError, match=says):
        model(tiny, **change)
