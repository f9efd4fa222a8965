"""What a step of the VAE minimises: L1, L2, LPIPS and a small KL divergence, and later what critics say of the result.

The weight of the critics is adaptive: at the decoder's last kernel their gradient is made as long as that of the
reconstruction (Esser et al., arXiv:2012.09841). Both losses see nothing but the reconstructed video, so their gradients
with respect to it are taken once each, weighed by a backward pass of the last convolution alone, and go backward
through the VAE as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from ml_collections import ConfigDict

from vidgen.batch import VideoBatch
from vidgen.config import ConfigError
from vidgen.objectives.critics import Critic, hinge, per_row
from vidgen.objectives.lpips import LEAST, lpips
from vidgen.tokenizers.vae import CausalVAE, Conv, unfold

MOST_WEIGHT = 1e4  # of the critics
PEAK = 2.0  # from the darkest to the brightest value, for PSNR


@dataclasses.dataclass(frozen=True)
class Critics:
    """The critics of a config, of frames and, unless None, of clips."""

    image: Critic
    video: Critic | None


def check(c: ConfigDict, shapes: Any) -> None:
    """Raises ConfigError on settings of `config.reconstruction` that mean nothing for chunks of these shapes."""
    if not c.l1 and not c.l2 and not c.lpips:
        raise ConfigError(
            "config.reconstruction: l1, l2 and lpips are all 0; expected one of them above 0, such as l1=1.0"
        )
    for shape in shapes:
        if c.lpips and min(shape.height, shape.width) < LEAST:
            raise ConfigError(
                f"config.reconstruction.lpips={c.lpips}: frames of {shape.text} are too small for LPIPS; expected "
                f"{LEAST}x{LEAST} or more in config.clips.shapes, or reconstruction.lpips=0"
            )


def critics_of(c: ConfigDict, dtype: Any) -> Critics | None:
    """The critics that `config.reconstruction` asks for; None: none."""
    if not c.gan:
        return None
    video = Critic(c.gan_dim, c.gan_layers, (3, 4, 4), dtype) if c.gan_video else None
    return Critics(Critic(c.gan_dim, c.gan_layers, (4, 4), dtype), video)


def init_critics(critics: Critics, key: jax.Array) -> tuple[Any, Any]:
    """(parameters, vectors of spectral norm) by critic: {"image": …, "video": …}."""
    image, video = jax.random.split(key)
    made = {"image": critics.image.init(image, jnp.zeros((1, 32, 32, 3)))}
    if critics.video:
        made["video"] = critics.video.init(video, jnp.zeros((1, 5, 32, 32, 3)))
    return tuple({name: v[part] for name, v in made.items()} for part in ("params", "batch_stats"))


def weight_of(vae: CausalVAE) -> Callable[[VideoBatch], jax.Array]:
    """batch → [B] f32: the latents of each chunk, in (t, y, x); 0 for one that could not be read."""
    st, sy, sx = vae.config.stride

    def weight(batch: VideoBatch) -> jax.Array:
        t, h, w = batch.video.shape[1:4]
        latents = ((t - 1) // st + 1) * (h // sy) * (w // sx)
        return jnp.where(batch.clip >= 0, float(latents), 0.0)

    return weight


def pixels(batch: VideoBatch) -> jax.Array:
    """[B,T,H,W,3] f32 in [-1, 1]."""
    return batch.video.astype(jnp.float32) / 127.5 - 1.0


def kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL divergence to a standard normal of each row, mean over its latent values, [B] f32."""
    return 0.5 * jnp.mean(mean * mean + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3, 4))


def absolute(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean absolute error of each row, [B]."""
    return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3, 4))


def squared(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared error of each row, [B]."""
    return jnp.mean(jnp.square(a - b), axis=(1, 2, 3, 4))


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of each row, [B] f32, in dB, of values in [-1, 1] after clipping `a`; 100 at most."""
    error = jnp.mean(jnp.square(jnp.clip(a, -1.0, 1.0) - b), axis=(1, 2, 3, 4))
    return 10.0 * jnp.log10(PEAK**2 / jnp.maximum(error, PEAK**2 * 1e-10))


def some_frames(video_BxTxHxWx3: jax.Array, order_BxT: jax.Array, count: int) -> jax.Array:
    """The first `count` of each row's frames in its own order, [B,count,H,W,3]; all if `count` is 0 or too many."""
    frames = video_BxTxHxWx3.shape[1]
    if not count or count >= frames:
        return video_BxTxHxWx3
    picked = order_BxT[:, :count, None, None, None]
    return jnp.take_along_axis(video_BxTxHxWx3, picked, axis=1)


def randomness(keys_B: jax.Array, latents: tuple[int, ...], frames: int) -> tuple[jax.Array, jax.Array]:
    """Each row's own: (standard normal [B,t,y,x,z], an order of its frames [B,T])."""

    def row(key):
        noise, order = jax.random.split(key)
        return jax.random.normal(noise, latents), jax.random.permutation(order, frames)

    return jax.vmap(row)(keys_B)


def perceptual(weights: Any, a_BxFxHxWx3: jax.Array, b_BxFxHxWx3: jax.Array, dtype: Any) -> jax.Array:
    """LPIPS, mean over the frames of each row, [B]; a frame of every row at a time, so that memory stays small."""

    def frame(pair):
        return lpips(weights, *pair, dtype=dtype)

    pairs = (jnp.moveaxis(a_BxFxHxWx3, 1, 0), jnp.moveaxis(b_BxFxHxWx3, 1, 0))
    return jax.lax.map(jax.checkpoint(frame), pairs).mean(axis=0)


def loss_of(vae: CausalVAE, c: ConfigDict, critics: Critics | None = None, placed: Callable[[Any], Any] = lambda x: x):
    """(params {"vae", "critics"}, inputs) → (summed loss, (vectors of spectral norm, more sums by name)).

    Every mean is over the rows of (a microbatch of) the batch by their weight, and handed out times all of that weight:
    divide by the weight of the global batch. "loss" is what the VAE is to make small, without the critics' opinion.

    Args:
      vae: the module.
      c: `config.reconstruction`.
      critics: None before they join.
      placed: lays the VAE's parameters as its layers want them.
    """
    weight = weight_of(vae)

    def loss_sum(params: Any, inputs: Any) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        batch, aux = inputs.batch, inputs.aux
        given = {"params": placed(params["vae"])}
        x = pixels(batch)
        weights = weight(batch)
        total = jnp.sum(weights)
        share = weights / jnp.maximum(total, 1e-9)
        mean, logvar = vae.apply(given, x, method="encode")
        noise, order = randomness(inputs.keys, mean.shape[1:], x.shape[1])
        latents = mean + jnp.exp(0.5 * logvar) * noise
        y, features = vae.apply(given, latents, features=True, method="decode")
        frames = some_frames(x, order, c.lpips_frames)

        def rebuilt(y):
            sums = {"l1": share @ absolute(y, x), "l2": share @ squared(y, x)}
            if c.lpips:
                sums["lpips"] = share @ perceptual(
                    inputs.frozen, some_frames(y, order, c.lpips_frames), frames, vae.dtype
                )
            return sum(c[name] * value for name, value in sums.items()), sums

        seen = stop_gradient(y)
        (value, sums), gradient = jax.value_and_grad(rebuilt, has_aux=True)(seen)
        sums |= {"kl": share @ kl(mean, logvar), "psnr": share @ psnr(seen, x)}
        theirs = 0.0
        if critics:
            views = [_views(v, order, c.lpips_frames) for v in (x, seen)]
            theirs, aux = _critics_loss(critics, params["critics"], aux, *views, share)
            fixed = stop_gradient((params["critics"], aux))

            def fooling(y):
                scores = _scores(critics, *fixed, _views(y, order, c.lpips_frames))
                return -sum(share @ per_row(s, len(share)) for s in scores.values())

            sums["gan"], wanted = jax.value_and_grad(fooling)(seen)
            factor = c.gan * _adaptive(vae, params["vae"], features, gradient, wanted)
            gradient = gradient + factor * wanted
            sums |= {"critics": theirs, "gan_weight": factor}
        # As a function of the VAE's parameters: worth `value`, with the gradient that comes through y.
        pull = jnp.vdot(y, stop_gradient(gradient))
        loss = value + (pull - stop_gradient(pull)) + c.kl * sums["kl"]
        loss = loss + (theirs - stop_gradient(theirs))  # trained alongside, and no part of the figure
        return total * loss, (aux, {name: total * stop_gradient(v) for name, v in sums.items()})

    return loss_sum


def _views(video_BxTxHxWx3: jax.Array, order_BxT: jax.Array, count: int) -> dict[str, jax.Array]:
    """What each critic is shown; that of clips sees no images."""
    frames = some_frames(video_BxTxHxWx3, order_BxT, count)
    views = {"image": frames.reshape(-1, *frames.shape[2:])}
    return views | ({"video": video_BxTxHxWx3} if video_BxTxHxWx3.shape[1] > 1 else {})


def _scores(critics: Critics, params: Any, vectors: Any, views: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the patches of each view that has a critic."""
    return {
        name: getattr(critics, name).apply({"params": params[name], "batch_stats": vectors[name]}, view)
        for name, view in views.items()
        if name in params
    }


def _critics_loss(
    critics: Critics,
    params: Any,
    vectors: Any,
    real: dict[str, jax.Array],
    fake: dict[str, jax.Array],
    share: jax.Array,
) -> tuple[jax.Array, Any]:
    """(what the critics minimise, the vectors after one power iteration)."""
    vectors = dict(vectors)
    for name in (name for name in real if name in params):  # in an order that is the same on every host
        given = {"params": stop_gradient(params[name]), "batch_stats": vectors[name]}
        # The vectors don't depend on what is shown; one of it is enough for the iteration.
        _, new = getattr(critics, name).apply(given, real[name][:1], update=True, mutable=["batch_stats"])
        vectors[name] = new["batch_stats"]
    of_real, of_fake = (_scores(critics, params, vectors, views) for views in (real, fake))
    losses = [share @ per_row(hinge(of_real[name], of_fake[name]), len(share)) for name in of_real]
    return sum(losses), vectors


def _adaptive(vae: CausalVAE, params: Any, features: jax.Array, rebuilt: jax.Array, wanted: jax.Array) -> jax.Array:
    """‖gradient of the reconstruction‖ / ‖gradient that the critics want‖ at the decoder's last kernel.

    Args:
      features: what its last convolution was given.
      rebuilt, wanted: gradients with respect to the video.
    """
    last = params["decoder"]["conv_out"]
    features = stop_gradient(features)

    def video(kernel):
        conv = Conv(kernel.shape[-1], kernel.shape[:-2], vae.dtype)
        x = conv.apply({"params": last | {"kernel": kernel}}, features, True)
        return unfold(x.astype(jnp.float32), vae.config.patch)

    _, back = jax.vjp(video, last["kernel"])
    norms = [jnp.linalg.norm(back(g)[0]) for g in (rebuilt, wanted)]
    return stop_gradient(jnp.minimum(norms[0] / (norms[1] + 1e-4), MOST_WEIGHT))


def heldout_sums(vae: CausalVAE, params: Any, batch: VideoBatch, c: ConfigDict) -> dict[str, jax.Array]:
    """Sums over the chunks that could be read, of what the latents' mean gives: l1, l2, kl, loss, psnr, chunks.

    The loss is without LPIPS and critics.
    """
    x = pixels(batch)
    mean, logvar = vae.apply({"params": params}, x, method="encode")
    y = vae.apply({"params": params}, mean, method="decode")
    values = {"l1": absolute(y, x), "l2": squared(y, x), "kl": kl(mean, logvar)}
    values["loss"] = sum(c[name] * value for name, value in values.items())
    values |= {"psnr": psnr(y, x), "chunks": jnp.ones(len(x))}
    return {name: jnp.sum(jnp.where(batch.clip >= 0, value, 0.0)) for name, value in values.items()}


def latent_sums(vae: CausalVAE, params: Any, batch: VideoBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Σ z [z_dim], Σ z² [z_dim], latents) over latents that are drawn, of the chunks that could be read."""
    mean, logvar = vae.apply({"params": params}, pixels(batch), method="encode")
    read = (batch.clip >= 0).astype(jnp.float32)[:, None, None, None, None]
    over = (0, 1, 2, 3)
    squares = jnp.sum(read * (mean * mean + jnp.exp(logvar)), axis=over)
    return jnp.sum(read * mean, axis=over), squares, jnp.sum(read) * (mean[0, ..., 0].size)
