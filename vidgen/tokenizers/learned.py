"""Latents of a trained VAE behind the interface of `tokenizers/base.py`.

The VAE is frozen while a denoiser trains on its latents. A clip is encoded on its own, in time chunks of few shapes,
on the host's first device; rows carry the moments of each token's posterior (mean, then log variance), and the step
draws from it, so a clip that comes again, or comes from a cache, is another sample of it.

**Which part of a clip.** The VAE is causal: the latents of a clip's first frames are the first of its latents. A clip
longer than its place in a row is therefore cut from its start (an exact tokenizer takes another stretch each pass), and
in space its middle is taken, so one encoding serves every cut of it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import weights as weights_on_disk
from vidgen.config import ConfigError
from vidgen.geometry import Geometry, Grid, patchify, unpatchify
from vidgen.tokenizers import chunked
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.tokenizers.vae import from_config as vae_from_config
from vidgen.weights import Weights

SMALL = 2**18  # pixels; chunks up to that are of up to LONG frames, which is faster; larger ones of chunked.FRAMES
LONG = 16
MOST_SIZES = 16  # (height, width) that are encoded while training, each of which is compiled
NO_WEIGHTS = (
    "config.tokenizer.weights is empty: config.tokenizer.name=vae wants a workdir that trained one (task=vae), or a "
    "directory of vidgen import"
)
_DRAW = 0x7AE  # folded into a row's key; larger than anything that the objective splits it into


@dataclasses.dataclass(frozen=True)
class LearnedTokenizer:
    """A frozen VAE. Two are equal, and hash alike, where their weights' digests and geometries do.

    Attributes:
      geometry: the VAE's stride and channels, and the patch of `config.tokenizer`.
      mean, std: of the latents, a channel each.
      digest: of the weights.
      weights: as read from disk; they go to a device when they are first needed. None: there are none, for plans.
    """

    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    weights: Weights | None = dataclasses.field(compare=False, repr=False)
    _placed: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    _lock: Any = dataclasses.field(default_factory=threading.Lock, compare=False, repr=False)

    learned: ClassVar[bool] = True

    @property
    def vae(self) -> CausalVAE:
        """The module; float32, so that latents are the same whatever `config.dtype`."""
        return CausalVAE(VAEConfig.from_dict(self.weights.config))

    def params(self, devices: int = 1) -> Any:
        """The VAE's parameters, whole on each of this host's first devices; raises ConfigError where there are none."""
        if self.weights is None:
            raise ConfigError(NO_WEIGHTS)
        with self._lock:
            if devices not in self._placed:
                self._placed[devices] = jax.device_put(self.weights.params, _over(devices, P()))
            return self._placed[devices]

    @property
    def fed(self) -> tuple[int, Any]:
        """Mean and log variance of a token's latents, f32."""
        return 2 * self.geometry.features, np.float32

    def encode_clips(self, video_BxTxHxWx3: np.ndarray, devices: int = 1) -> np.ndarray:
        """u8 clips of one size → moments [B,t,y,x,2z] f32: mean, then log variance, as the VAE gives them.

        `devices`: of this host, that share the clips; B divides over them.

        Safe to call from several threads: one encodes at a time. Raises ConfigError if the VAE gives no numbers.
        """
        frames, height, width = video_BxTxHxWx3.shape[1:4]
        if self.geometry.fit(frames, height, width) != (frames, height, width):
            nearest = self.geometry.fit(frames, height, width)
            raise ValueError(f"{frames}x{height}x{width} does not cut into tokens; nearest: {nearest}")
        params, place = self.params(devices), _over(devices, P("clips"))
        pieces = chunked.split(video_BxTxHxWx3, self.geometry.stride[0], self.chunk(frames, height, width))
        with self._lock:
            pieces = (jax.device_put(np.ascontiguousarray(piece), place) for piece in pieces)
            chunks = [np.concatenate(c, axis=-1) for c in chunked.encode_chunks(self.vae, params, pieces)]
        moments = np.concatenate(chunks, axis=1)
        if not np.isfinite(moments).all():
            raise ConfigError(
                f"the VAE {self.digest} gives latents that are no finite numbers; train or import it anew"
            )
        return moments

    def encode_clip(self, video_TxHxWx3: np.ndarray) -> np.ndarray:
        """A u8 clip → moments [t,y,x,2z] f32; see `encode_clips`."""
        return self.encode_clips(video_TxHxWx3[None])[0]

    def fill(self, video_TxHxWx3: np.ndarray) -> np.ndarray:
        """A clip's moments, a token each; see `Tokenizer`."""
        return self.fill_moments(self.encode_clip(video_TxHxWx3))

    def fill_moments(self, moments_TxYxXx2Z: np.ndarray) -> np.ndarray:
        """[t,y,x,2z] → [tokens, 2P]: the means of a token's patch, then their log variances."""
        halves = np.split(moments_TxYxXx2Z, 2, axis=-1)
        return np.concatenate([patchify(half, self.geometry.patch) for half in halves], axis=-1)

    def latents(self, fed_BxSxD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """Draws from the posteriors (their means without keys), then (x - mean) / std; see `Tokenizer`."""
        values, logvar = jnp.split(fed_BxSxD, 2, axis=-1)
        if keys_B is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, _DRAW))(keys_B)
            noise = jax.vmap(lambda key: jax.random.normal(key, values.shape[1:]))(keys)
            values = values + jnp.exp(logvar / 2) * noise
        mean, std = self._of_token()
        return (values - mean) / std

    def decode_tokens(self, tokens_BxSxP: Any, grid: Grid) -> np.ndarray:
        """Tokens → video [B,T,H,W,3] f32 NumPy around [-1, 1], clip by clip, in time chunks; not traceable."""
        mean, std = self._of_token()
        params, size = self.params(), self._pixels(grid)
        videos = []
        for tokens in np.asarray(tokens_BxSxP, np.float32):
            latents = unpatchify(tokens * std + mean, grid, self.geometry.patch)[None]
            with self._lock:
                videos.append(chunked.decode(self.vae, params, latents, self.chunk(*size)))
        return np.concatenate(videos)

    def _of_token(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std), [P] f32: the channels' for each latent of a patch."""
        copies = math.prod(self.geometry.patch)
        return tuple(np.tile(np.asarray(value, np.float32), copies) for value in (self.mean, self.std))

    def _pixels(self, grid: Grid) -> Grid:
        """(frames, height, width) of a clip of so many tokens."""
        (t, y, x), (_, height, width) = grid, self.geometry.block
        return 1 + (t * self.geometry.patch[0] - 1) * self.geometry.stride[0], y * height, x * width

    def chunk(self, frames: int, height: int, width: int) -> int:
        """Frames of the chunks, after the first frame, of a clip of 1 + n: the most that divide n, up to 16 of small
        pictures and 4 of others, so that clips of any length go through in few shapes, and unpadded."""
        stride = self.geometry.stride[0]
        limit = LONG if LONG * height * width <= SMALL else chunked.FRAMES
        most = max(min(limit, frames - 1) // stride, 1) * stride
        return next(n for n in range(most, 0, -stride) if (frames - 1) % n == 0)

    def chunk_shapes(self, sizes: np.ndarray) -> list[tuple[int, int, int]]:
        """The distinct (frames, height, width) of the chunks that clips of these fitted sizes, [n,3], are encoded in.

        Raises ConfigError where they have more than 16 heights and widths.
        """
        spaces = {(height, width) for _, height, width in sizes.tolist()}
        if len(spaces) > MOST_SIZES:
            raise ConfigError(
                f"the clips have {len(spaces)} sizes (height x width), and each is compiled for: at most {MOST_SIZES} "
                "are encoded while training; make a cache with vidgen encode and set config.data.latents, or ingest "
                "with --height and --width"
            )
        shapes = set()
        for frames, height, width in sizes.tolist():
            lengths = chunked.shapes(frames, self.geometry.stride[0], self.chunk(frames, height, width))
            shapes |= {(length, height, width) for length in lengths}
        return sorted(shapes, key=lambda s: (s[1], s[2], s[0]))


def _over(devices: int, spec: P) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()[:devices]), ("clips",)), spec)


def geometry_from_config(c: ConfigDict, vae: ConfigDict | None = None) -> Geometry:
    """The geometry of `config.tokenizer` with name=vae; reads no arrays. Raises ConfigError.

    `vae`: `config.vae`, of a VAE without weights; None: there have to be some.
    """
    shape = _shape(c, vae)
    if tuple(c.stride) not in ((), shape.stride):
        raise ConfigError(
            f"config.tokenizer.stride={tuple(c.stride)}, but the VAE in {c.weights or 'config.vae'} has {shape.stride}"
            f"; set config.tokenizer.stride={shape.stride}, or () for the VAE's own"
        )
    return Geometry(shape.stride, tuple(c.patch), shape.z_dim)


def _shape(c: ConfigDict, vae: ConfigDict | None = None) -> VAEConfig:
    if not c.weights and vae is None:
        raise ConfigError(NO_WEIGHTS)
    if not c.weights:
        return vae_from_config(vae)
    directory = weights_on_disk.find(c.weights)
    try:
        return VAEConfig.from_dict(weights_on_disk.describe(directory, "vae")["config"])
    except ConfigError as e:
        raise ConfigError(f"config.tokenizer.weights={c.weights}: {e}") from None


def from_config(c: ConfigDict, vae: ConfigDict | None = None) -> LearnedTokenizer:
    """The tokenizer of `config.tokenizer` with name=vae; reads the weights, and puts them on no device yet.

    `vae`: as of `geometry_from_config`. Raises ConfigError: no weights there, of another kind, not what the VAE's shape
    asks for, another stride.
    """
    geometry, shape = geometry_from_config(c, vae), _shape(c, vae)
    if not c.weights:
        return LearnedTokenizer(geometry, (0.0,) * shape.z_dim, (1.0,) * shape.z_dim, "", None)
    found = weights_on_disk.load(weights_on_disk.find(c.weights), "vae")
    check_params(found, shape, c.weights)
    mean = shape.latents_mean or (0.0,) * shape.z_dim
    std = shape.latents_std or (1.0,) * shape.z_dim
    return LearnedTokenizer(geometry, tuple(map(float, mean)), tuple(map(float, std)), found.digest, found)


def check_params(found: Weights, shape: VAEConfig, where: str) -> None:
    """Raises ConfigError naming the first array that is missing, too many, or of another shape than the VAE's."""
    video = jax.ShapeDtypeStruct((1, 1 + shape.stride[0], *shape.stride[1:], 3), jnp.float32)
    wanted = jax.eval_shape(CausalVAE(shape).init, jax.random.key(0), video)["params"]
    wanted = {name: array.shape for name, array in weights_on_disk.flatten(wanted).items()}
    have = {name: array.shape for name, array in weights_on_disk.flatten(found.params).items()}
    for name in sorted(wanted.keys() | have.keys()):
        if wanted.get(name) != have.get(name):
            raise ConfigError(
                f"config.tokenizer.weights={where}: {name} has shape {have.get(name, 'none: it is missing')}; "
                f"expected {wanted.get(name, 'no such array in a VAE of this config')}"
            )
