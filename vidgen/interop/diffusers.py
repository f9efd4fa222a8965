"""Weights of diffusers and transformers in and out: a directory of `save_pretrained` ↔ modules and weights directories.

    component = load_component("Wan2.1-T2V-1.3B-Diffusers/vae")
    mean, logvar = component.encode(video)  # NumPy [B,3,T,H,W] in [-1, 1], as diffusers has it

Which class a directory is of stands in its `config.json`, and `CLASSES` says who reads it. A weights directory has the
arrays in the files' own dtypes, and `source.json` beside them: the texts of config.json, of the index and of the files'
headers, from which `write` gives back the very bytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from vidgen import tensors, weights
from vidgen.config import ConfigError
from vidgen.interop import arrays as arrays_on_disk
from vidgen.interop import checkpoint, dit_transformer, names, t5, wan_transformer, wan_vae
from vidgen.interop.arrays import Arrays
from vidgen.interop.packed import KIND
from vidgen.models.architecture import Architecture
from vidgen.text.t5 import T5Config

SOURCE = "source.json"  # beside a weights directory's files: what was imported
Component = wan_vae.WanVAE | wan_transformer.WanTransformer | dit_transformer.DiTTransformer | t5.T5


@dataclasses.dataclass(frozen=True)
class Class:
    """How one of diffusers' or transformers' classes is read and written.

    kind: of weights directory.
    read_config: (config.json, its file) → the module's config; raises ConfigError.
    settle: (the module's config, the files) → the config, where that depends on what the files hold.
    write_config: the module's config → the settings of config.json; raises ConfigError where the class has no such.
    config_from: a weights directory's config → the module's config.
    entries: (the module's config, the names that files have) → all its parameters under both names.
    build: (module's config, params, settings) → Component.
    """

    kind: str
    read_config: Callable[[Mapping[str, Any], str], Any]
    settle: Callable[[Any, checkpoint.Checkpoint], Any]
    write_config: Callable[[Any], dict[str, Any]]
    config_from: Callable[[Mapping[str, Any]], Any]
    entries: Callable[[Any, Collection[str]], tuple[names.Entry, ...]]
    build: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Component]


def _class(module: Any, kind: str, config: Any, component: Any) -> Class:
    return Class(
        kind=kind,
        read_config=module.read_config,
        settle=module.settle if module is dit_transformer else lambda config, files: config,
        write_config=module.write_config,
        config_from=config.from_dict,
        entries=module.entries if module is t5 else lambda config, keys: module.entries(config),
        build=component.build,
    )


CLASSES = {
    "AutoencoderKLWan": _class(wan_vae, wan_vae.KIND, wan_vae.VAEConfig, wan_vae.WanVAE),
    "WanTransformer3DModel": _class(wan_transformer, KIND, Architecture, wan_transformer.WanTransformer),
    "DiTTransformer2DModel": _class(dit_transformer, KIND, Architecture, dit_transformer.DiTTransformer),
    **{name: _class(t5, kind, T5Config, t5.T5) for name, kind in t5.CLASSES.items()},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model on disk, under vidgen's names and in its layouts; no array has been read.

    Attributes:
      name: of the class.
      config: the module's, a dataclass with `to_dict`.
      arrays: by Flax path.
      settings: config.json as it stood.
      dtypes: {diffusers' key: dtype in the file}.
      checkpoint: the files.
    """

    name: str
    config: Any
    arrays: Arrays
    settings: dict[str, Any]
    dtypes: dict[str, str]
    checkpoint: checkpoint.Checkpoint

    @property
    def kind(self) -> str:
        """Of its weights directories."""
        return CLASSES[self.name].kind

    @functools.cached_property
    def flat(self) -> dict[str, np.ndarray]:
        """{Flax path: float32 array}, all of them."""
        return {path: self.arrays.read(path, "float32") for path in self.arrays.specs}


def load_component(directory: str | os.PathLike[str]) -> Component:
    """The model in `directory`, to be called as the class of diffusers or transformers that it is.

    Args:
      directory: with `config.json` and `diffusion_pytorch_model.safetensors` (`model.safetensors` of transformers), or
        an index of several such files; of a pipeline with `model_index.json`, its `vae/` is taken.

    Returns:
      A `Component`, with `module`, `params`, `config` and the calls of its class: an `AutoencoderKLWan` has `encode`
      and `decode`, all others are called. NumPy in and out, in PyTorch's layouts.

    Raises ConfigError for a class or a setting that is not implemented, for pickles, and for tensors that are missing,
    unexpected, cut short or of another shape.
    """
    model = read(directory)
    return CLASSES[model.name].build(model.config, weights.nest(model.flat), model.settings)


def class_of(settings: Mapping[str, Any], file: str) -> str:
    """The class that a config.json names, as diffusers or as transformers do; raises ConfigError if it isn't known."""
    name = settings.get("_class_name")
    if name is None and isinstance(architectures := settings.get("architectures"), list) and len(architectures) == 1:
        name = architectures[0]
    if name not in CLASSES:
        near = difflib.get_close_matches(str(name), CLASSES, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"{file}: _class_name is {name!r}; known are {', '.join(CLASSES)}{hint}")
    return name


def read(directory: str | os.PathLike[str]) -> Model:
    """Reads what is in a directory, as `load_component` does, and no array yet; raises ConfigError."""
    found = checkpoint.open_directory(os.fspath(directory))
    file = os.path.join(found.directory, checkpoint.CONFIG)
    name = class_of(found.config, file)
    config = CLASSES[name].settle(CLASSES[name].read_config(found.config, file), found)
    try:
        arrays = arrays_on_disk.of_checkpoint(CLASSES[name].entries(config, found.tensors.keys()), found)
    except ConfigError as e:
        raise ConfigError(f"{e}{_fitting(name, found)}") from None
    dtypes = {key: stored.dtype for key, stored in found.tensors.items()}
    return Model(name, config, arrays, found.config, dtypes, found)


def _fitting(name: str, found: checkpoint.Checkpoint) -> str:
    """What to say of those settings of config.json of which one alone keeps the files from fitting; empty for none."""

    def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        config = CLASSES[name].read_config(config, "")
        return {entry.key: entry.stored for entry in CLASSES[name].entries(config, stored.keys())}

    stored = {key: tensor.shape for key, tensor in found.tensors.items()}
    pairs = {
        (a, b)
        for key, shape in shapes(found.config).items()
        for a, b in zip(shape, stored.get(key, ()), strict=False)
        if a != b
    }
    numbers = (re.search(r"\.(\d+)\.", key) for key in stored)
    blocks = 1 + max((int(number[1]) for number in numbers if number), default=0)
    fitting = []
    for key, value in found.config.items():
        if type(value) is not int or value < 1:
            continue
        # A setting is a size, or a part of one, or how many blocks there are.
        near = {b for a, b in pairs if a == value} | {value * b // a for a, b in pairs if value * b % a == 0} | {blocks}
        for other in sorted(near - {0, value})[:4]:
            try:
                if shapes({**found.config, key: other}) == stored:
                    fitting.append(f"{key}={other}")
            except (ConfigError, ValueError, TypeError, ZeroDivisionError):
                continue
    return f"; config.json would fit the tensors with {' or '.join(fitting)}" if fitting else ""


def store(model: Model, directory: str) -> str:
    """Makes an empty directory one of weights, an array at a time; returns the digest. Raises OSError, ConfigError."""
    arrays = model.arrays
    digest = weights.stream(directory, model.kind, model.config.to_dict(), arrays.specs, arrays.read)
    found = model.checkpoint
    with open(os.path.join(found.directory, checkpoint.CONFIG), encoding="utf-8", newline="") as f:
        texts = {checkpoint.CONFIG: f.read()}
    facts = {
        "format": "diffusers",
        "class": model.name,
        "digest": digest,
        "files": texts | dict([found.index] if found.index else []),
        "headers": dict(found.headers),
    }
    with open(os.path.join(directory, SOURCE), "w", encoding="utf-8") as f:
        json.dump(facts, f, indent=2, sort_keys=True)
    return digest


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` wrote: the class's name, {diffusers' key: dtype in the file}, and the bytes of the tensors."""

    name: str
    dtypes: dict[str, str]
    nbytes: int


def write(directory: str, kind: str, config: Mapping[str, Any], arrays: Arrays, source: str = "") -> Written:
    """Writes weights as diffusers reads them into a directory that is there, a tensor at a time.

    Args:
      directory: to write to.
      kind, config: of the weights.
      arrays: the weights.
      source: a weights directory that `store` made of the same architecture. Its config.json, files, order and dtypes
        are taken; without one, all of diffusers' settings and one file are written, in the arrays' own dtypes.

    Raises ConfigError for weights that no class of diffusers is for, or that don't fit their own config.
    """
    facts = kept(source) if source else None
    name, found = _class_for(kind, config, arrays.where, facts["class"] if facts else "")
    keys: set[str] = set()
    if facts:
        files, headers = facts["files"], facts["headers"]
        for file, text in headers.items():
            keys |= tensors.parse(text, file).keys()
    entries = {entry.key: entry for entry in CLASSES[name].entries(found, keys)}
    _check(entries, arrays)
    if not facts:
        files, headers = _files(name, found, {key: (e.stored, arrays.specs[e.path][1]) for key, e in entries.items()})
    dtypes: dict[str, str] = {}
    nbytes = 0
    for file, text in headers.items():
        path = os.path.join(directory, file)
        stored = tensors.parse(text, path)
        with tensors.Writer(path, text) as written:
            for key in sorted(stored, key=lambda key: stored[key].offset):
                if key not in entries or entries[key].stored != stored[key].shape:
                    where = os.path.join(source, SOURCE)
                    raise ConfigError(
                        f"{where}: {key} {list(stored[key].shape)} does not fit {arrays.where}; both have to be of one "
                        "architecture"
                    )
                written.write(key, _tensor(entries[key], arrays, stored[key].dtype))
                dtypes[key] = stored[key].dtype
                nbytes += stored[key].nbytes
    for file, text in files.items():
        with open(os.path.join(directory, file), "w", encoding="utf-8", newline="") as f:
            f.write(text)
    return Written(name, dtypes, nbytes)


def _files(name: str, config: Any, specs: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[dict, dict]:
    """({file: its text}, {file of tensors: its header}) of a model that was not imported."""
    settings = CLASSES[name].write_config(config)
    if "architectures" not in settings:  # as transformers has it
        settings = {"_class_name": name, **settings}
    plain = checkpoint.TRANSFORMERS if "architectures" in settings else checkpoint.TENSORS
    files = {checkpoint.CONFIG: json.dumps(settings, indent=2, sort_keys=True) + "\n"}
    return files, {plain: tensors.header_of(specs, {"format": "pt"})}


def kept(directory: str, digest: str | None = None) -> dict[str, Any] | None:
    """What `store` wrote beside the weights; None if nothing, or if they aren't of this digest any more."""
    path = os.path.join(directory, SOURCE)
    if not os.path.exists(path):
        return None
    facts = checkpoint.read_json(path, "what `vidgen import` writes")
    if set(facts) != {"format", "class", "digest", "files", "headers"} or facts["class"] not in CLASSES:
        raise ConfigError(f"{path}: not what this version's `vidgen import` writes; import anew, or remove the file")
    for file in (*facts["files"], *facts["headers"]):
        if os.path.basename(file) != file:
            raise ConfigError(f"{path}: {file!r}: expected the name of a file")
    return facts if digest in (None, facts["digest"]) else None


def _class_for(kind: str, config: Mapping[str, Any], where: str, name: str) -> tuple[str, Any]:
    """(the class that weights are written as, the module's config): `name` if given, else the first that fits."""
    fitting = [name] if name else [name for name, row in CLASSES.items() if row.kind == kind]
    if not fitting:
        kinds = ", ".join(dict.fromkeys(row.kind for row in CLASSES.values()))
        raise ConfigError(f"{where}: weights of kind {kind!r}; diffusers has classes for: {kinds}")
    reasons = []
    for name in fitting:
        try:
            found = CLASSES[name].config_from(config)
            CLASSES[name].write_config(found)
            return name, found
        except ConfigError as e:
            reasons.append(f"{name}: {e}" if len(fitting) > 1 else str(e))
    raise ConfigError(f"{where}: {'; '.join(reasons)}")


def _check(entries: Mapping[str, names.Entry], arrays: Arrays) -> None:
    """Raises ConfigError for an array that is missing, unexpected or of another shape."""
    stacks = names.stacks(entries.values())
    if odd := sorted(stacks.keys() ^ arrays.specs.keys()):
        what = "no array" if odd[0] in stacks else "not of this model: array"
        raise ConfigError(f"{arrays.where}: {what} {odd[0]}; expected {len(stacks)} arrays, found {len(arrays.specs)}")
    for path, rows in stacks.items():
        if (shape := names.whole_shape(rows)) != arrays.specs[path][0]:
            raise ConfigError(f"{arrays.where}: {path} has shape {list(arrays.specs[path][0])}; expected {list(shape)}")


def _tensor(entry: names.Entry, arrays: Arrays, dtype: str) -> np.ndarray:
    array = arrays.read(entry.path) if entry.layer is None else arrays.row(entry.path, entry.layer)
    return entry.to_torch(array).astype(dtype, copy=False)
