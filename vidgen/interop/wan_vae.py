"""diffusers' `AutoencoderKLWan`, the VAE of Wan 2.1 (arXiv:2503.20314) and of Wan 2.2: settings, names, calls."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop.names import Entry
from vidgen.tokenizers import chunked
from vidgen.tokenizers.vae import CausalVAE, VAEConfig

KIND = "vae"  # of a weights directory

# What diffusers takes where config.json is silent, as those of Wan 2.1 are about the newer keys.
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": list(WAN21_MEAN),
    "latents_std": list(WAN21_STD),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    # These two change nothing in the module: the strides follow from its levels.
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
SILENT = ("clip_output",)  # written by conversion scripts, read by nobody: diffusers always clamps

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "gamma",
    "resample_kernel": "resample.1.weight",  # after the padding or the upsampling, which is resample.0
    "resample_bias": "resample.1.bias",
    "time_conv_kernel": "time_conv.weight",
    "time_conv_bias": "time_conv.bias",
}


@dataclasses.dataclass(frozen=True, eq=False)
class WanVAE:
    """An `AutoencoderKLWan`, to be called as diffusers' is, with NumPy arrays, channels first, in float32.

    Clips go through in time chunks, so memory beside the clip's own does not grow with their duration.

    Attributes:
      module: the Flax module, a `CausalVAE`.
      params: its parameters, float32.
      config: diffusers' settings, with its defaults where config.json is silent.

    Where diffusers changes a clip without a word, this refuses it: `encode` there drops the frames behind the last
    1 + 4k, and odd rows and columns.
    """

    module: CausalVAE
    params: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def build(cls, config: VAEConfig, params: Mapping[str, Any], settings: Mapping[str, Any]) -> WanVAE:
        """From the shape, NumPy parameters and the settings in diffusers' terms."""
        return cls(CausalVAE(config), jax.tree.map(jnp.asarray, dict(params)), DEFAULTS | dict(settings))

    def encode(self, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The posterior of the latents: (mean, logvar), not normalised by latents_mean and latents_std.

        Args:
          video: [B,3,T,H,W] floats in [-1, 1]; T = 1 + k·stride_t, H and W multiples of the stride.

        Returns:
          Two arrays [B,z,t,y,x] f32; logvar within [-30, 20]. diffusers' `posterior.mean` and `posterior.logvar`.

        Raises ValueError for another shape, naming the nearest, for integers, and for NaN or infinity.
        """
        video = _checked(video, "video", 3, "[B,3,T,H,W]")
        stride = self.module.config.stride
        t, h, w = video.shape[2:]
        for name, size, step, first in (
            ("frames", t, stride[0], 1),
            ("rows", h, stride[1], 0),
            ("columns", w, stride[2], 0),
        ):
            if (size - first) % step:
                below = size - (size - first) % step
                near = [n for n in (below, below + step) if n > 0]
                raise ValueError(
                    f"video of {size} {name}: expected {'1 + ' if first else ''}a multiple of {step}; "
                    f"nearest: {' or '.join(map(str, near))}"
                )
        mean, logvar = chunked.encode(self.module, self.params, _last(video))
        return _first(mean), _first(logvar)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents [B,z,t,y,x], not normalised → video [B,3,T,H,W] f32, clamped to [-1, 1]; T = 1 + (t-1)·stride_t.

        Raises ValueError for another shape, for integers, and for NaN or infinity.
        """
        latents = _checked(latents, "latents", self.module.config.z_dim, "[B,z,t,y,x]")
        return _first(np.clip(chunked.decode(self.module, self.params, _last(latents)), -1.0, 1.0))


def read_config(config: Mapping[str, Any], file: str) -> VAEConfig:
    """The shape that diffusers' settings ask for.

    Raises ConfigError for a setting that this module does not have, by its name; `file` is where they stand.
    """
    c = DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_") and key not in SILENT}
    if unknown := [key for key in c if key not in DEFAULTS]:
        near = difflib.get_close_matches(unknown[0], DEFAULTS, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{file}: {unknown[0]} is no setting of AutoencoderKLWan that vidgen knows{hint}")
    for key in ("attn_scales", "dropout"):
        if c[key]:
            raise ConfigError(f"{file}: {key}={c[key]!r} is not implemented; expected {DEFAULTS[key]!r}")
    for key in ("base_dim", "z_dim", "num_res_blocks"):
        _natural(c[key], key, file)
    for key in ("decoder_base_dim", "patch_size"):
        if c[key] is not None:
            _natural(c[key], key, file)
    _list(c["dim_mult"], int, "dim_mult", file)
    _list(c["temperal_downsample"], bool, "temperal_downsample", file)
    if not isinstance(c["is_residual"], bool):
        raise ConfigError(f"{file}: is_residual={c['is_residual']!r}: expected true or false")
    patch = c["patch_size"] or 1
    for key in ("in_channels", "out_channels"):
        if c[key] != 3 * patch**2:
            raise ConfigError(
                f"{file}: {key}={c[key]!r}: expected {3 * patch**2}, three colours of patch_size={c['patch_size']}"
            )
    mean, std = _latents(c, file)
    try:
        return VAEConfig(
            base_dim=c["base_dim"],
            decoder_base_dim=c["decoder_base_dim"] or 0,
            z_dim=c["z_dim"],
            dim_mult=tuple(c["dim_mult"]),
            num_res_blocks=c["num_res_blocks"],
            temporal_downsample=tuple(c["temperal_downsample"]),
            residual=c["is_residual"],
            patch=patch,
            latents_mean=mean,
            latents_std=std,
        )
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from None


def write_config(config: VAEConfig) -> dict[str, Any]:
    """Inverse of `read_config`: all of diffusers' settings."""
    channels, stride = 3 * config.patch**2, config.stride
    return {
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim or None,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean) or [0.0] * config.z_dim,
        "latents_std": list(config.latents_std) or [1.0] * config.z_dim,
        "is_residual": config.residual,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": stride[0],
        "scale_factor_spatial": stride[1],
    }


@functools.lru_cache(maxsize=8)
def entries(config: VAEConfig) -> tuple[Entry, ...]:
    """Every parameter of a VAE of this shape under both names, each once."""
    st, sy, sx = config.stride
    video = jax.ShapeDtypeStruct((1, 1 + st, sy, sx, 3), jnp.float32)
    shapes = jax.eval_shape(CausalVAE(config).init, jax.random.key(0), video)["params"]
    found = []
    for path, like in sorted(weights.flatten(shapes).items()):
        shape, (*parts, leaf) = like.shape, path.split("/")
        key = ".".join([*(re.sub(r"_(\d+)$", r".\1", part) for part in parts), LEAVES[leaf]])
        if leaf == "gamma":
            # Norms inside the attention are of images there, all others of videos.
            stored = (*shape, 1, 1) if parts[-2].startswith("attentions") else (*shape, 1, 1, 1)
        elif leaf.endswith("kernel"):
            window = shape[1:-2] if parts[-1] in ("to_qkv", "proj") else shape[:-2]  # 2D there
            stored = (shape[-1], shape[-2], *window)
        else:
            stored = shape
        found.append(Entry(path, shape, key, stored))
    assert len({entry.key for entry in found}) == len(found), "two parameters under one name"
    return tuple(found)


def _checked(array: Any, name: str, channels: int, layout: str) -> np.ndarray:
    """`array` as float32; raises ValueError if it is not five-dimensional, finite, of floats, or of other channels."""
    array = np.asarray(array)
    if array.ndim != 5 or array.shape[1] != channels or 0 in array.shape:
        hint = f"; move the channels first: {name}.transpose(0, 4, 1, 2, 3)"
        last = array.ndim == 5 and array.shape[-1] == channels
        raise ValueError(
            f"{name} of shape {list(array.shape)}: expected {layout} with {channels} channels{hint if last else ''}"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        hint = " in [-1, 1]: pixels / 127.5 - 1" if name == "video" else ""
        raise ValueError(f"{name} of {array.dtype}: expected floats{hint}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        b, c, t, y, x = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name}[{b}, {c}, {t}, {y}, {x}] is {array[b, c, t, y, x]}: expected finite values")
    return array


def _last(array: np.ndarray) -> np.ndarray:
    """Channels first → channels last."""
    return np.moveaxis(array, 1, -1)


def _first(array: Any) -> np.ndarray:
    """Channels last → channels first."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1))


def _natural(value: Any, key: str, file: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{file}: {key}={value!r}: expected a whole number ≥ 1")


def _list(value: Any, kind: type, key: str, file: str) -> None:
    if not isinstance(value, list | tuple) or any(type(v) is not kind for v in value):
        name = {int: "whole numbers", bool: "true and false"}[kind]
        raise ConfigError(f"{file}: {key}={value!r}: expected a list of {name}, like {DEFAULTS[key]}")


def _latents(c: Mapping[str, Any], file: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """latents_mean and latents_std; both empty if 0 and 1, or if they are of another width because nobody set them."""
    found = []
    for key in ("latents_mean", "latents_std"):
        value = c[key]
        if not isinstance(value, list | tuple) or any(
            isinstance(v, bool) or not isinstance(v, int | float) for v in value
        ):
            raise ConfigError(
                f"{file}: {key}={value!r}: expected a list of numbers, one for each of z_dim={c['z_dim']}"
            )
        found.append(tuple(float(v) for v in value))
    if tuple(found) == (WAN21_MEAN, WAN21_STD) and c["z_dim"] != len(WAN21_MEAN):
        return (), ()
    for key, value in zip(("latents_mean", "latents_std"), found, strict=True):
        if len(value) != c["z_dim"]:
            raise ConfigError(f"{file}: {key} has {len(value)} values; expected z_dim={c['z_dim']}")
        std = key == "latents_std"
        if bad := [v for v in value if not np.isfinite(v) or std and v <= 0]:
            raise ConfigError(f"{file}: {key} holds {bad[0]}; expected finite numbers{' above 0' if std else ''}")
    mean, std = found
    return ((), ()) if not any(mean) and set(std) == {1.0} else (mean, std)
