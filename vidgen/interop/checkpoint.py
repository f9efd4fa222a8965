"""A directory as diffusers saves a model: `config.json`, and tensors in one safetensors file or several with an index.

Tensors are read one at a time. Pickles (`.bin`, `.pt`, `.pth`, `.ckpt`) are never opened: they can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.weights import PICKLES

CONFIG, PIPELINE = "config.json", "model_index.json"
TENSORS, INDEX = "diffusion_pytorch_model.safetensors", ".safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what is read; anything else is a packed format


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, its shape there, and its dtype there as NumPy names it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, with no tensor read yet.

    directory: that has the files; of a pipeline, the part that was taken.
    config: `config.json` as it stands there.
    tensors: by their names in the files.
    """

    directory: str
    config: dict[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def where(self) -> str:
        """The file of the tensors, or the directory of several; for messages."""
        files = {stored.file for stored in self.tensors.values()}
        return files.pop() if len(files) == 1 else self.directory

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array in the stored dtype), one after the other: only what the caller keeps stays in memory."""
        for file in sorted({stored.file for stored in self.tensors.values()}):
            with _opened(file) as tensors:
                for name, stored in self.tensors.items():
                    if stored.file == file:
                        yield name, tensors.get_tensor(name)


def open_directory(directory: str) -> Checkpoint:
    """Reads `config.json` and the headers of the tensors' files.

    Of a whole pipeline (`model_index.json`) its `vae/` is taken. Raises ConfigError for what is missing, cut short,
    inconsistent, or a pickle.
    """
    directory = _part(_directory(directory))
    config = read_json(os.path.join(directory, CONFIG), "what diffusers saves beside the tensors")
    files = _files(directory)
    tensors: dict[str, Stored] = {}
    for file, wanted in files.items():
        tensors |= _headers(file, wanted)
    return Checkpoint(directory, config, tensors)


def read_json(path: str, what: str) -> dict[str, Any]:
    """A JSON object; raises ConfigError, which says that `what` was expected."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected {what}") from None
    except ValueError as e:
        raise ConfigError(f"{path}: not JSON ({e}); expected {what}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, {what}")
    return found


@contextlib.contextmanager
def new_directory(path: str) -> Iterator[str]:
    """A directory to fill, which is at `path` once the block ends, whole, or not at all.

    Raises ConfigError if something is there already, or nothing can be written there.
    """
    path = os.path.abspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{path}: a file; expected a new directory")
    if os.path.isdir(path) and (there := sorted(os.listdir(path))):
        raise ConfigError(f"{path}: expected a new or an empty directory, it holds {there[0]}")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a place that can be written") from None
    try:
        os.chmod(made, 0o755)  # mkdtemp's are private
        yield made
        os.rename(made, path)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a place that can be written") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _directory(path: str) -> str:
    """`path` if it is a directory; raises ConfigError, saying what a lone file should have been."""
    if os.path.isdir(path):
        return path
    if path.lower().endswith(PICKLES):
        raise _pickle(path)
    if os.path.isfile(path):
        raise ConfigError(f"{path}: a file; expected the directory that holds it and {CONFIG}")
    raise ConfigError(f"{path}: no such directory; expected one that diffusers' save_pretrained wrote")


def _part(directory: str) -> str:
    """The directory of the model itself: `vae/` if this is a whole pipeline."""
    index = os.path.join(directory, PIPELINE)
    if not os.path.isfile(index) or os.path.isfile(os.path.join(directory, CONFIG)):
        return directory
    parts = {
        name: value[1]
        for name, value in read_json(index, "a pipeline of diffusers").items()
        if isinstance(value, list) and len(value) == 2 and value[1]
    }
    if os.path.isfile(os.path.join(directory, "vae", CONFIG)):
        return os.path.join(directory, "vae")
    named = ", ".join(f"{name}/ ({kind})" for name, kind in parts.items()) or "none"
    raise ConfigError(
        f"{directory}: a pipeline without vae/{CONFIG}; its parts: {named}; expected one part's directory"
    )


def _files(directory: str) -> dict[str, set[str] | None]:
    """Files that hold the tensors → names that must be in each, None where no index says."""
    names = sorted(os.listdir(directory))
    whole = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(INDEX)]
    if TENSORS in whole:  # as diffusers does: the plain name before an index, and both before a variant
        return {os.path.join(directory, TENSORS): None}
    default = TENSORS.removesuffix(".safetensors") + INDEX
    if default in indexes or len(indexes) == 1:
        return _indexed(directory, default if default in indexes else indexes[0])
    if len(whole) == 1 and not indexes:
        return {os.path.join(directory, whole[0]): None}
    if whole:
        raise ConfigError(f"{directory}: expected one {TENSORS} or an index of several, found {', '.join(whole[:4])}")
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise _pickle(os.path.join(directory, pickles[0]))
    raise ConfigError(f"{directory}: no tensors; expected {TENSORS} or {default}")


def _indexed(directory: str, name: str) -> dict[str, set[str] | None]:
    path = os.path.join(directory, name)
    index = read_json(path, "an index of safetensors files")
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise ConfigError(f"{path}: expected weight_map, the file of each tensor")
    files: dict[str, set[str] | None] = {}
    for tensor, file in shards.items():
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{path}: {tensor} is in {file!r}; expected a safetensors file in the same directory")
        files.setdefault(os.path.join(directory, file), set()).add(tensor)
    return files


def _headers(file: str, wanted: set[str] | None) -> dict[str, Stored]:
    """The tensors of one file; `wanted` are the names that an index expects there."""
    with _opened(file) as tensors:
        names = list(tensors.keys())
        if wanted is not None and (odd := sorted(wanted ^ set(names))):
            raise ConfigError(
                f"{file}: {'lacks' if odd[0] in wanted else 'has'} {odd[0]}, the index of the directory says otherwise"
            )
        found = {name: (tuple(s.get_shape()), s.get_dtype()) for name in names for s in [tensors.get_slice(name)]}
    for name, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise ConfigError(f"{file}: {name} is of dtype {dtype}; expected {', '.join(DTYPES)} (not quantised)")
    return {name: Stored(file, shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A safetensors file, its arrays mapped from disk; raises ConfigError if it is missing, cut short or none."""
    import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, "numpy")
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        raise ConfigError(f"{file}: {'no such file' if missing else e}; expected a safetensors file") from None
    except SafetensorError as e:
        raise ConfigError(f"{file}: not a whole safetensors file ({e}); download or save it again") from None
    with opened as tensors:
        yield tensors


def _pickle(path: str) -> ConfigError:
    return ConfigError(
        f"{path}: a pickle, which can run code, so it is not read; expected safetensors, as diffusers writes: "
        "AutoencoderKLWan.from_pretrained(DIR), or .from_single_file(FILE) of Wan's own, then .save_pretrained(OUT)"
    )
