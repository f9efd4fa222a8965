"""Whatever takes a clip apart and puts it together again: the tokenizers, and the linear baseline beside them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.geometry import Geometry, Grid
from vidgen.studio import media
from vidgen.tokenizers import base

EXACT = ("patch", "wavelet")


@dataclasses.dataclass(frozen=True)
class Codec:
    """A tokenizer as its reconstructions show it.

    Attributes:
      name: in tables.
      kind: vae, patch, wavelet, or linear (the wavelet with `channels` of its coefficients).
      geometry: strides, patch, and channels, which are the values that a latent keeps.
      source: the directory of its weights; empty where it has none.
      digest: of the weights.
      values: clip in [-1, 1] of a size that cuts into tokens, [1,T,H,W,3] u8 → f32 around [-1, 1], the same shape.
    """

    name: str
    kind: str
    geometry: Geometry
    values: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False, compare=False)
    source: str = ""
    digest: str = ""

    def reconstruct(self, video_TxHxWx3: np.ndarray) -> np.ndarray:
        """A u8 clip of any size, there and back, u8.

        Sizes that don't cut into tokens are padded to `Geometry.cover` (the last frame and the pixels at the bottom
        and at the right stand several times), and the result is cropped back. Raises ConfigError where a value is NaN
        or infinite.
        """
        frames, height, width = video_TxHxWx3.shape[:3]
        values = np.asarray(self.values(padded(video_TxHxWx3, self.geometry)[None])[0])[:frames, :height, :width]
        if not np.isfinite(values).all():
            raise ConfigError(f"{self.name}: its reconstruction of a clip has values that are NaN or infinite")
        return media.to_u8(values)

    def latent_values(self, frames: int, height: int, width: int) -> int:
        """How many numbers stand for a clip of this size, padding included."""
        return int(np.prod(self.geometry.latent_grid(*self.geometry.cover(frames, height, width)))) * self.channels

    def tokens(self, frames: int, height: int, width: int) -> int:
        """How many tokens a clip of this size has, padding included."""
        return int(self.geometry.tokens(*self.geometry.cover(frames, height, width)))

    @property
    def channels(self) -> int:
        """Values that a latent keeps."""
        return self.geometry.channels


def padded(video_TxHxWx3: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Up to `geometry.cover`: the last frame, the last row and the last column are repeated."""
    size = video_TxHxWx3.shape[:3]
    more = [(0, wanted - have) for wanted, have in zip(geometry.cover(*size), size, strict=True)]
    return np.pad(video_TxHxWx3, (*more, (0, 0)), mode="edge")


def of_run(config: ConfigDict, workdir: str) -> Codec:
    """What the run in `workdir` trained (task=vae), or trains on."""
    c = ConfigDict(config.tokenizer)
    if config.task == "vae":
        return _vae(workdir, tuple(c.patch))
    return _vae(c.weights, tuple(c.patch)) if c.name == "vae" else _exact(c.name, c)


def named(which: str, c: ConfigDict) -> Codec:
    """A tokenizer by what `--tokenizer` says.

    Args:
      which: patch or wavelet, at the strides of `config.tokenizer`; or a directory of weights; or a workdir that has
        some.
      c: `config.tokenizer`.

    Raises ConfigError.
    """
    if which in EXACT:
        return _exact(which, c)
    if os.path.isdir(which):
        return _vae(which, tuple(c.patch))
    near = difflib.get_close_matches(which, EXACT, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--tokenizer={which}: expected {', '.join(EXACT)}, a directory of weights or a workdir{hint}")


def distinct(codecs: Sequence[Codec]) -> list[Codec]:
    """Without those that stand twice; names that clash are told apart by their folders, then by number."""
    seen: dict[tuple, Codec] = {}
    for codec in codecs:
        seen.setdefault((codec.kind, codec.geometry, codec.digest), codec)
    out: list[Codec] = []
    for codec in seen.values():
        name, number = codec.name, 2
        if name in (c.name for c in out) and codec.kind == "vae":
            name = os.path.join(os.path.basename(os.path.dirname(_home(codec.source))), name)
        while name in (c.name for c in out):
            name, number = f"{codec.name} {number}", number + 1
        out.append(dataclasses.replace(codec, name=name))
    return out


def _home(path: str) -> str:
    """The folder that people call it by: of a workdir's weights/, the workdir."""
    path = os.path.abspath(path)
    return os.path.dirname(path) if os.path.basename(path) == "weights" else path


def _vae(path: str, patch: Grid) -> Codec:
    directory = weights.find(path) if path else ""
    settings = {"name": "vae", "weights": directory, "stride": (), "patch": patch, "mean": 0.0, "std": 1.0}
    tokenizer = base.from_config(ConfigDict(settings))
    name = os.path.basename(_home(directory))
    return Codec(name, "vae", tokenizer.geometry, _through(tokenizer), os.path.abspath(directory), tokenizer.digest)


def _exact(name: str, c: ConfigDict) -> Codec:
    stride = tuple(c.stride) or (4, 8, 8)
    tokenizer = base.from_config(ConfigDict({**c.to_dict(), "name": name, "weights": "", "stride": stride}))
    return Codec(name, name, tokenizer.geometry, _through(tokenizer))


def _through(tokenizer: base.Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """The way of a clip through tokens and back, as the trainer and the sampler go it; of a posterior, the mean."""

    def back(fed: jax.Array, grid: Grid) -> jax.Array:
        return tokenizer.decode_tokens(tokenizer.latents(fed, None), grid)

    back = back if tokenizer.learned else jax.jit(back, static_argnums=1)
    return lambda video: back(tokenizer.fill(video[0])[None], tokenizer.geometry.grid(*video.shape[1:4]))


def linear(stride: Grid, patch: Grid, kept: Iterable[int], clips: Iterable[np.ndarray]) -> list[Codec]:
    """The linear baseline: the wavelet of these strides, cut to the coefficients that vary most over `clips`.

    For each number in `kept`, a codec that keeps so many values a latent and puts each of the others at its mean. That
    is what a fixed transform gives at a compression where a VAE has learned something.

    Args:
      stride, patch: powers of two; as in `Geometry`.
      kept: values a latent, 1 to 3 · stride_t · stride_y · stride_x; others are left out.
      clips: u8 [T,H,W,3], of the training set: variances and means are measured on them.

    Raises ConfigError where there is no clip.
    """
    channels = 3 * stride[0] * stride[1] * stride[2]
    tokenizer = base.BlockTokenizer(Geometry(tuple(stride), (1, 1, 1), channels), "haar")

    @jax.jit
    def moments(video: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = tokenizer.encode(video.astype(jnp.float32) / 127.5 - 1).reshape(-1, channels)
        return latents.sum(0), jnp.square(latents).sum(0)

    @jax.jit
    def cut(keep: jax.Array, mean: jax.Array, video: jax.Array) -> jax.Array:
        latents = tokenizer.encode(video.astype(jnp.float32) / 127.5 - 1)
        return tokenizer.decode(jnp.where(keep, latents, mean))

    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for clip in clips:
        video = padded(clip, tokenizer.geometry)
        a, b = moments(video[None])
        total, squares = total + np.asarray(a, np.float64), squares + np.asarray(b, np.float64)
        count += int(np.prod(tokenizer.geometry.latent_grid(*video.shape[:3])))
    if not count:
        raise ConfigError("the linear baseline is measured on training clips, and none could be read")
    mean = total / count
    order = np.argsort(-(squares / count - mean**2), kind="stable")
    codecs = []
    for k in sorted({k for k in kept if 1 <= k <= channels}):
        keep = np.zeros(channels, bool)
        keep[order[:k]] = True
        geometry = Geometry(tuple(stride), tuple(patch), k)
        name = f"linear {'x'.join(map(str, stride))}, {k}"
        values = lambda video, keep=keep: cut(keep, mean.astype(np.float32), video)  # noqa: E731
        codecs.append(Codec(name, "linear", geometry, values))
    return codecs
