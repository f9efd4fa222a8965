"""Weights from disk onto devices, one array at a time: the host never holds them all."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import arrays as arrays_on_disk
from vidgen.interop import checkpoint, diffusers
from vidgen.interop.arrays import Arrays

PIPELINE = "pipeline.json"  # of what `vidgen import` made of a whole pipeline


def find(directory: str, kind: str = "denoiser") -> str:
    """The directory that a setting such as config.model.weights means; raises ConfigError.

    Itself, the `weights/` of a workdir, or the part of an imported pipeline that is of such a kind: the first, so of
    two experts the one for high noise levels.
    """
    path = os.path.join(directory, PIPELINE)
    if not os.path.isfile(path):
        return weights.find(directory)
    parts = checkpoint.read_json(path, "what `vidgen import` writes").get("parts", {})
    for name in sorted(parts):
        if parts[name] == kind:
            return weights.find(os.path.join(directory, name))
    found = ", ".join(f"{name} ({of})" for name, of in sorted(parts.items())) or "none"
    raise ConfigError(f"{directory}: a pipeline without weights of kind {kind!r}; its parts: {found}")


def load_onto(directory: str, like: Any, dtype: Any = None, partial: bool = False) -> Any:
    """Reads weights straight into their places, the largest array first.

    Memory of the host beside what lies on its devices: no more than one array of the tree (of stacked layers, all of
    them), and none of it when the next is read. Each process reads what all have, and keeps what is on its devices.

    Args:
      directory: weights of vidgen (a weights directory, a workdir with `weights/`, an imported pipeline, of which its
        denoiser is taken), or a model's directory of diffusers or transformers.
      like: a tree of the parameters, with a `jax.sharding.Sharding` at each leaf, or a ShapeDtypeStruct that has one,
        whose shape is then checked, and whose dtype is taken; or one sharding for all.
      dtype: of the arrays; None: that of `like`, or as they are stored.
      partial: `like` may lack some of the arrays, which then aren't read.

    Returns:
      The tree of `like` with jax.Arrays, or nested dicts.

    Raises ConfigError: what `diffusers.read` and `weights.load` raise, and arrays that are missing, unexpected or of
    another shape, by name.
    """
    arrays = _opened(directory)
    if isinstance(like, jax.sharding.Sharding):
        places = dict.fromkeys(arrays.specs, like)
    else:
        places = weights.flatten(like)
    _check(arrays, places, partial)
    found = {}
    for path in sorted(places, key=lambda path: -math.prod(arrays.specs[path][0])):
        place = places[path]
        struct = isinstance(place, jax.ShapeDtypeStruct)
        wanted = dtype or (place.dtype if struct else None)
        found[path] = _placed(arrays.read(path, wanted), place.sharding if struct else place)
    return weights.nest({path: found[path] for path in places})


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]))


def _opened(directory: str) -> Arrays:
    if not os.path.isfile(os.path.join(directory, PIPELINE)) and not os.path.exists(
        os.path.join(directory, weights.JSON)
    ):
        config = os.path.join(directory, checkpoint.CONFIG)
        if os.path.isfile(config):
            settings = checkpoint.read_json(config, "settings of a model")
            if "_class_name" in settings or "architectures" in settings:
                return diffusers.read(directory).arrays
    return arrays_on_disk.of_weights(find(directory))


def _check(arrays: Arrays, places: dict[str, Any], partial: bool) -> None:
    if odd := sorted(places.keys() - arrays.specs.keys() if partial else places.keys() ^ arrays.specs.keys()):
        what = "lacks" if odd[0] in places else "has"
        raise ConfigError(
            f"{arrays.where}: {what} {odd[0]}, the config's model {'has it' if odd[0] in places else 'does not'}; "
            "expected weights of one architecture with it"
        )
    for path, place in places.items():
        if isinstance(place, jax.ShapeDtypeStruct) and place.shape != arrays.specs[path][0]:
            raise ConfigError(
                f"{arrays.where}: {path} has shape {list(arrays.specs[path][0])}; the config's model has "
                f"{list(place.shape)}"
            )
