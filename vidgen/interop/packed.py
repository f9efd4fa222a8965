"""What diffusers' transformers have in common as configs of the packed DiT: settings, shapes, inputs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from vidgen import weights
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models import dit
from vidgen.models.architecture import Architecture

KIND = "denoiser"  # of a weights directory


@dataclasses.dataclass(frozen=True, eq=False)
class Transformer:
    """A transformer of diffusers, to be called as its class is there, with NumPy arrays, channels first, in float32.

    Attributes:
      DEFAULTS: the settings of the class and their defaults.
      module: the Flax module, a `DiT`.
      params: its parameters, float32.
      config: diffusers' settings, with its defaults where config.json is silent.
      architecture: ours.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]]
    module: dit.DiT
    params: dict[str, Any]
    config: dict[str, Any]
    architecture: Architecture

    @classmethod
    def build(cls, config: Architecture, params: Mapping[str, Any], settings: Mapping[str, Any]) -> Self:
        """From the architecture, NumPy parameters and the settings in diffusers' terms."""
        arrays = jax.tree.map(jnp.asarray, dict(params))
        return cls(module_of(config), arrays, dict(cls.DEFAULTS) | dict(settings), config)


def settings_of(config: Mapping[str, Any], defaults: Mapping[str, Any], name: str, file: str) -> dict[str, Any]:
    """The settings of config.json over a class's defaults; raises ConfigError for one that it does not have."""
    c = dict(defaults) | {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := [key for key in c if key not in defaults]:
        near = difflib.get_close_matches(unknown[0], defaults, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{file}: {unknown[0]} is no setting of {name} that vidgen knows{hint}")
    return c


def refuse_other(config: Architecture, common: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError for the first setting of an architecture that a class of diffusers does not have."""
    for key, value in common.items():
        if config[key] != value:
            raise ConfigError(f"config.model.{key}={config[key]!r}: diffusers' {name} has {value!r} only")


def natural(value: Any, key: str, file: str) -> None:
    """Raises ConfigError unless `value` is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{file}: {key}={value!r}: expected a whole number ≥ 1")


def module_of(config: Architecture) -> dit.DiT:
    """The denoiser of an architecture, on one device, in float32."""
    run = config.config()
    run.model.remat = "none"
    return dit.from_config(run, config.features, None)


def shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters of an architecture, {path: shape}, with nothing computed."""
    module = module_of(config)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    text = {"text": (f32((1, 1, config.text_width)), one)} if config.text_width else {}
    batch = TokenBatch(tokens=None, coords=f32((1, 1, 3)), segment=one, level=one, context=text)
    tree = jax.eval_shape(module.init, jax.random.key(0), f32((1, 1, config.features)), f32((1, 1)), batch)["params"]
    return {path: tuple(x.shape) for path, x in weights.flatten(tree).items()}


def noisy_first(noisy: int, channels: int, cells: int) -> tuple[int, ...] | None:
    """Order of a patch's numbers [cells, channels] that has the noisy channels of all cells before the others."""
    if noisy == channels:
        return None
    order = np.arange(cells * channels).reshape(cells, channels)
    return tuple(np.concatenate([order[:, :noisy].ravel(), order[:, noisy:].ravel()]).tolist())


@functools.partial(jax.jit, static_argnums=0, static_argnames="with_sigma")
def predict(module: dit.DiT, params: Any, noisy, levels, batch: TokenBatch, with_sigma: bool = False) -> jax.Array:
    """`module.apply`, compiled once a shape."""
    return module.apply({"params": params}, noisy, levels, batch, with_sigma)


def grid_coords(grid: tuple[int, int, int]) -> np.ndarray:
    """[tokens, 3] f32: (t, y, x) of a grid's tokens, t-major."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float32)


def levels_of(timestep: Any, rows: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [B] or [B,S] on the scale 0 to 1000 → (noise levels [B,N] f32, which of them a token has [B,S] i32)."""
    timestep = np.asarray(timestep)
    if timestep.shape not in ((rows,), (rows, tokens)):
        raise ValueError(f"timestep of shape {list(timestep.shape)}: expected [{rows}] or [{rows}, {tokens}]")
    timestep = timestep.astype(np.float64)
    if not np.all((timestep >= 0) & (timestep <= 1000)):
        raise ValueError(f"timestep {timestep.min():g} to {timestep.max():g}: expected 0 to 1000")
    if timestep.ndim == 1:
        return (timestep[:, None] / 1000).astype(np.float32), np.zeros((rows, tokens), np.int32)
    found = [np.unique(row, return_inverse=True) for row in timestep]
    most = max(len(values) for values, _ in found)
    levels = np.stack([np.pad(values, (0, most - len(values))) for values, _ in found]) / 1000
    return levels.astype(np.float32), np.stack([index.reshape(-1) for _, index in found]).astype(np.int32)


def checked(array: Any, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """`array` as float32; raises ValueError if it is not of that shape (None: any), finite and of floats."""
    array = np.asarray(array)
    wanted = tuple(n if wanted is None else wanted for n, wanted in zip(array.shape, shape, strict=False))
    if array.ndim != len(shape) or array.shape != wanted or 0 in array.shape:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} of shape {list(array.shape)}: expected [{wanted}]")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} of {array.dtype}: expected floats")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity: expected finite values")
    return array
