"""A directory of weights: `weights.json`, what they are of, and `weights.safetensors`, the arrays.

Nothing of it is executed: safetensors hold numbers, and JSON says which module they belong to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vidgen import tensors
from vidgen.config import ConfigError

JSON, TENSORS = "weights.json", "weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # names that they go by


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Weights as they lie on disk.

    Attributes:
      kind: of module, such as "vae".
      config: of that module, plain JSON values.
      params: nested dict of NumPy arrays, in the module's own names and layouts.
      digest: 16 hex digits of a hash over kind, config and arrays, as they lie on disk.
    """

    kind: str
    config: dict[str, Any]
    params: dict[str, Any]
    digest: str


def save(directory: str, kind: str, config: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Writes a directory of weights, whole or not at all, in place of weights that were there.

    Raises ConfigError where it can't be written, or where the directory holds something else.
    """
    directory = os.path.abspath(directory)
    if os.path.isdir(directory) and (other := set(os.listdir(directory)) - {JSON, TENSORS}):
        raise ConfigError(f"{directory}: expected an empty or a new directory, it holds {sorted(other)[0]}")
    parent = os.path.dirname(directory)
    try:
        os.makedirs(parent, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{os.path.basename(directory)}.", dir=parent)
        try:
            os.chmod(made, 0o755)
            write_safetensors(os.path.join(made, TENSORS), flatten(params))
            with open(os.path.join(made, JSON), "w", encoding="utf-8") as f:
                json.dump({"kind": kind, "config": dict(config)}, f, indent=2, sort_keys=True)
            if os.path.isdir(directory):
                old = f"{made}.old"
                os.rename(directory, old)
                os.rename(made, directory)
                shutil.rmtree(old)
            else:
                os.rename(made, directory)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as e:
        raise ConfigError(f"{directory}: {e.strerror or e}; expected a place that can be written") from None


def stream(
    directory: str,
    kind: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
) -> str:
    """Fills an empty directory as `save` does, one array at a time, and returns the digest.

    Args:
      directory: is there already.
      arrays: {"a/b/c": (shape, dtype)}.
      read: the array of that name, of that shape and dtype; called once each.

    Raises OSError.
    """

    def written() -> Iterator[tuple[str, np.ndarray]]:
        for name in sorted(arrays):
            array = read(name)
            file.write(name, array)
            yield name, array

    with open(os.path.join(directory, JSON), "w", encoding="utf-8") as f:
        json.dump({"kind": kind, "config": dict(config)}, f, indent=2, sort_keys=True)
    with tensors.Writer(os.path.join(directory, TENSORS), tensors.header_of(arrays)) as file:
        return _digest(kind, config, written())


def load(directory: str, kind: str = "") -> Weights:
    """Reads a directory of weights, of this kind if one is given; bfloat16 and float16 become float32, which holds
    them exactly. Raises ConfigError.
    """
    about = describe(directory, kind)
    flat = read_safetensors(os.path.join(directory, TENSORS))
    found = digest(about["kind"], about["config"], flat)
    for name, array in flat.items():
        if array.dtype in ("float16", "bfloat16"):
            flat[name] = array.astype(np.float32)
    return Weights(about["kind"], about["config"], nest(flat), found)


def headers(directory: str) -> dict[str, tensors.Stored]:
    """{"a/b/c": where it lies} of a directory of weights; raises ConfigError."""
    return tensors.header(os.path.join(directory, TENSORS))[0]


def describe(directory: str, kind: str = "") -> dict[str, Any]:
    """{"kind", "config"} of a directory of weights, without its arrays; raises ConfigError."""
    path = os.path.join(directory, JSON)
    try:
        with open(path, encoding="utf-8") as f:
            about = json.load(f)
        found = about["kind"], dict(about["config"])
    except OSError as e:
        if os.path.isfile(directory):
            hint = "; a pickle can run code and is never read" if directory.lower().endswith(PICKLES) else ""
            raise ConfigError(f"{directory}: a file; expected a directory with {JSON} and {TENSORS}{hint}") from None
        raise ConfigError(f"{path}: {e.strerror or e}; expected a directory of weights{_hint(directory)}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: not what vidgen writes ({e})") from None
    if kind and found[0] != kind:
        raise ConfigError(f"{path}: weights of kind {found[0]!r}; expected {kind!r}")
    return {"kind": found[0], "config": found[1]}


def find(path: str) -> str:
    """The directory of weights that `path` means: itself, or `weights/` in a workdir; raises ConfigError."""
    for directory in (path, os.path.join(path, "weights")):
        if os.path.exists(os.path.join(directory, JSON)):
            return directory
    describe(path)  # says what is missing
    raise ConfigError(f"{path}: no weights there")


def _hint(directory: str) -> str:
    """What a directory without weights is instead, and what to do about it."""
    try:
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as f:
            workdir = '"task"' in f.read()  # of a run's settings; diffusers has no such key
    except (OSError, ValueError):
        workdir = None
    if workdir or os.path.isdir(os.path.join(directory, "checkpoints")):
        return ", and this is a workdir without weights/; a run with task=vae writes it at each checkpoint"
    if workdir is None:
        return ""
    return f"; weights of diffusers become one by: vidgen import --format diffusers {directory} --output OUT"


def digest(kind: str, config: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> str:
    """16 hex digits that change with the kind, the config, and any bit, shape, dtype or name of the arrays."""
    return _digest(kind, config, ((name, flat[name]) for name in sorted(flat)))


def digest_of(directory: str) -> str:
    """`digest` of a directory of weights, an array at a time; raises ConfigError."""
    about, stored = describe(directory), headers(directory)
    return _digest(about["kind"], about["config"], ((name, stored[name].read()) for name in sorted(stored)))


def _digest(kind: str, config: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    h = hashlib.sha256(json.dumps([kind, dict(config)], sort_keys=True).encode())
    for name, array in arrays:
        array = np.ascontiguousarray(array)
        h.update(f"{name} {array.dtype} {array.shape}".encode())
        h.update(array.reshape(-1).view(np.uint8).data)
    return h.hexdigest()[:16]


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → {"a/b/c": leaf}; leaves, arrays or only their shapes, stay what they are."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file as they stand there; raises ConfigError if it is missing, cut or none."""
    return tensors.read_all(path)


def write_safetensors(path: str, flat: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes arrays as a safetensors file; raises OSError."""
    tensors.write_all(path, {name: np.asarray(value) for name, value in flat.items()}, metadata)
