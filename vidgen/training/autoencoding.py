"""Training a VAE on chunks of video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.data import chunks
from vidgen.data.chunks import Shape
from vidgen.geometry import Grid
from vidgen.models.attention import dtype_of
from vidgen.objectives import lpips, reconstruction
from vidgen.parallel.mesh import make_mesh
from vidgen.tokenizers import vae as vaes
from vidgen.tokenizers.vae import CausalVAE
from vidgen.training.task import Task


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the VAE, its chunks and its objective that can't be used."""
    if config.mesh.tensor > 1:
        raise ConfigError(
            f"config.mesh.tensor={config.mesh.tensor}: a VAE has no axis of that kind; nearest: mesh.tensor=1, and "
            "mesh.context for chunks that are too large for a device"
        )
    if config.model.weights or config.lora.rank:
        what = "config.model.weights" if config.model.weights else "config.lora.rank"
        raise ConfigError(f"{what} is of a denoiser, and config.task=vae trains none; leave it out")
    reconstruction.check(config.reconstruction, shapes(config))


def stride(config: ConfigDict) -> Grid:
    """Pixels that a latent covers in (t, y, x)."""
    return vaes.from_config(config.vae).stride


def shapes(config: ConfigDict) -> tuple[Shape, ...]:
    """Of the chunks; raises ConfigError."""
    return chunks.shapes_of(config.clips, stride(config))


def largest(config: ConfigDict) -> Shape:
    """The shape that a step has most pixels of."""
    return max(shapes(config), key=lambda s: s.count * math.prod(s.size))


def mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Of all devices, or those given, over which chunks and their height divide; raises ConfigError."""
    found = make_mesh(config.mesh, 0, 0, devices=devices)  # no rows of tokens, which divide over any
    chunks.check_fit(shapes(config), dict(found.shape), config.optimizer.accumulate)
    return found


def task(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Task:
    """The VAE of a config, and its critics; its model is a `CausalVAE`. `platform` makes no difference."""
    del platform
    c, dtype = config.reconstruction, dtype_of("dtype", config.dtype)
    chunks.check_fit(shapes(config), dict(mesh.shape), config.optimizer.accumulate)
    vae = CausalVAE(vaes.from_config(config.vae), dtype, config.vae.remat)
    critics = reconstruction.critics_of(c, dtype)

    def init(key: jax.Array) -> tuple[Any, Any]:
        of_vae, of_critics = jax.random.split(key)
        st, sy, sx = vae.config.stride
        params = {"vae": vae.init(of_vae, jnp.zeros((1, 1 + st, 2 * sy, 2 * sx, 3)))["params"]}
        if not critics:
            return params, None
        theirs, vectors = reconstruction.init_critics(critics, of_critics)
        return params | {"critics": theirs}, vectors

    def placed(params: Any) -> Any:
        """Gathered before use: a VAE is small beside its activations, and convolutions are not split by channels."""
        return jax.lax.with_sharding_constraint(params, jax.tree.map(lambda _: NamedSharding(mesh, P()), params))

    losses = [(0, reconstruction.loss_of(vae, c, None, placed))]
    if critics:
        losses.append((c.gan_start, reconstruction.loss_of(vae, c, critics, placed)))
    weight = reconstruction.weight_of(vae)
    return Task(
        model=vae,
        init=init,
        losses=tuple(losses),
        weight=lambda batch, keys: weight(batch),
        batch_like=chunks.batch_like(largest(config)),
        batch_shardings=chunks.batch_shardings(mesh),
        frozen=lpips.load() if c.lpips else None,
    )
