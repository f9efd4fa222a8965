"""Weights of diffusers in and out: a directory of `save_pretrained` ↔ modules and weights directories of vidgen.

    component = load_component("Wan2.1-T2V-1.3B-Diffusers/vae")
    mean, logvar = component.encode(video)  # NumPy [B,3,T,H,W] in [-1, 1], as diffusers has it

Which class a directory is of stands in its `config.json`, and `CLASSES` says who reads it. Parameters are float32 here.
Files in bfloat16 or float16 fit into that exactly; a weights directory keeps beside the arrays which dtype each tensor
had (`source.json`), and so `write` gives back the very bytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import checkpoint, names, wan_vae

SOURCE = "source.json"  # beside a weights directory's files: what was imported
Component = wan_vae.WanVAE  # what `load_component` returns: a union of these, as more classes come


@dataclasses.dataclass(frozen=True)
class Class:
    """How one of diffusers' classes is read and written.

    kind: of weights directory.
    read_config: (config.json, its file) → the module's config; raises ConfigError.
    write_config: the module's config → the settings of config.json.
    config_from: a weights directory's config → the module's config.
    entries: the module's config → all its parameters under both names.
    build: (module's config, params, settings) → Component.
    """

    kind: str
    read_config: Callable[[Mapping[str, Any], str], Any]
    write_config: Callable[[Any], dict[str, Any]]
    config_from: Callable[[Mapping[str, Any]], Any]
    entries: Callable[[Any], tuple[names.Entry, ...]]
    build: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Component]


CLASSES = {
    "AutoencoderKLWan": Class(
        kind=wan_vae.KIND,
        read_config=wan_vae.read_config,
        write_config=wan_vae.write_config,
        config_from=wan_vae.VAEConfig.from_dict,
        entries=wan_vae.entries,
        build=wan_vae.WanVAE.build,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model of diffusers' as read from disk, in vidgen's names and layouts.

    Attributes:
      name: of the class.
      config: the module's, a dataclass with `to_dict`.
      flat: {Flax path: float32 array}.
      settings: config.json as it stood.
      dtypes: {diffusers' key: dtype in the file}.
    """

    name: str
    config: Any
    flat: dict[str, np.ndarray]
    settings: dict[str, Any]
    dtypes: dict[str, str]


def load_component(directory: str | os.PathLike[str]) -> Component:
    """The model in `directory`, to be called as the class of diffusers that it is.

    Args:
      directory: with `config.json` and `diffusion_pytorch_model.safetensors`, or an index of several such files; of a
        pipeline with `model_index.json`, its `vae/` is taken.

    Returns:
      A `Component`, with `module`, `params`, `config` and the methods of its class: of an `AutoencoderKLWan`, `encode`
      and `decode`.

    Raises ConfigError for a class or a setting that is not implemented, for pickles, and for tensors that are missing,
    unexpected, cut short or of another shape.
    """
    model = read(directory)
    return CLASSES[model.name].build(model.config, weights.nest(model.flat), model.settings)


def read(directory: str | os.PathLike[str]) -> Model:
    """Reads a directory as `load_component` does, and builds no module; raises ConfigError."""
    found = checkpoint.open_directory(os.fspath(directory))
    file = os.path.join(found.directory, checkpoint.CONFIG)
    name = found.config.get("_class_name")
    if name not in CLASSES:
        near = difflib.get_close_matches(str(name), CLASSES, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{file}: _class_name is {name!r}; known are {', '.join(CLASSES)}{hint}")
    config = CLASSES[name].read_config(found.config, file)
    flat = names.read(CLASSES[name].entries(config), found)
    return Model(name, config, flat, found.config, {key: stored.dtype for key, stored in found.tensors.items()})


def write(directory: str, found: weights.Weights, where: str) -> Model:
    """Writes weights as diffusers reads them, `config.json` and one safetensors file, into a directory that is there.

    Args:
      directory: to write to.
      found: what to write.
      where: the weights directory it came from. If `keep` left its facts there, config.json and the dtypes become what
        they were; else all of diffusers' settings are written, and the arrays' own dtypes.

    Returns what was written. Raises ConfigError for weights that no class of diffusers is for, or that don't fit their
    own config.
    """
    name = next((name for name, row in CLASSES.items() if row.kind == found.kind), "")
    if not name:
        kinds = ", ".join(row.kind for row in CLASSES.values())
        raise ConfigError(f"{where}: weights of kind {found.kind!r}; diffusers has classes for: {kinds}")
    row = CLASSES[name]
    try:
        config = row.config_from(found.config)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    kept = _kept(where, found.digest)
    settings = kept["config"] if kept else {"_class_name": name, **row.write_config(config)}
    flat = weights.flatten(found.params)
    tensors = names.write(row.entries(config), flat, kept["dtypes"] if kept else {}, where)
    weights.write_safetensors(os.path.join(directory, checkpoint.TENSORS), tensors, {"format": "pt"})
    with open(os.path.join(directory, checkpoint.CONFIG), "w", encoding="utf-8") as f:
        json.dump(settings, f, indent=2, sort_keys=True)
        f.write("\n")
    return Model(name, config, flat, settings, {key: str(array.dtype) for key, array in tensors.items()})


def keep(directory: str, model: Model, digest: str) -> None:
    """Puts beside a weights directory's files what an exact export needs: config.json, and the dtype of each tensor."""
    with open(os.path.join(directory, SOURCE), "w", encoding="utf-8") as f:
        facts = {"format": "diffusers", "digest": digest, "config": model.settings, "dtypes": model.dtypes}
        json.dump(facts, f, indent=2, sort_keys=True)


def _kept(directory: str, digest: str) -> dict[str, Any] | None:
    """What `keep` wrote for weights of this digest; None if nothing, or if the weights have changed since."""
    path = os.path.join(directory, SOURCE)
    if not os.path.exists(path):
        return None
    facts = checkpoint.read_json(path, "what `vidgen import` writes")
    if set(facts) != {"format", "digest", "config", "dtypes"}:
        raise ConfigError(f"{path}: not what `vidgen import` writes; without this file the export is in float32")
    return facts if facts["digest"] == digest else None
