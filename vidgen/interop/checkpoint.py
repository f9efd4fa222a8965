"""A directory as diffusers and transformers save a model: `config.json`, and tensors in one safetensors file or several
with an index.

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

from vidgen import tensors
from vidgen.config import ConfigError
from vidgen.tensors import Stored
from vidgen.weights import PICKLES

CONFIG, PIPELINE = "config.json", "model_index.json"
TENSORS, INDEX = "diffusion_pytorch_model.safetensors", ".safetensors.index.json"
TRANSFORMERS = "model.safetensors"  # as transformers names it
DTYPES = ("float32", "float16", "bfloat16")  # what is read; anything else is a packed format


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, with no tensor read yet.

    directory: that has the files; of a pipeline, the part that was taken.
    config: `config.json` as it stands there.
    tensors: by their names in the files.
    headers: {file name: header of it}, the very text.
    index: (name, text) of the index of several files; None where there is one file.
    """

    directory: str
    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    headers: Mapping[str, str]
    index: tuple[str, str] | None

    @property
    def where(self) -> str:
        """The file of the tensors, or the directory of several; for messages."""
        files = {stored.file for stored in self.tensors.values()}
        return files.pop() if len(files) == 1 else self.directory

    def read(self, key: str) -> np.ndarray:
        """A tensor in its stored dtype; raises ConfigError for weights that are not finite."""
        array = self.tensors[key].read()
        if not np.isfinite(array).all():
            raise ConfigError(f"{self.tensors[key].file}: {key} holds NaN or infinity; expected finite weights")
        return array


def open_directory(directory: str) -> Checkpoint:
    """Reads `config.json` and the headers of the tensors' files.

    Of a whole pipeline (`model_index.json`) its `vae/` is taken. Raises ConfigError for what is missing, cut short,
    inconsistent, or a pickle.
    """
    directory = _part(_directory(directory))
    config = read_json(os.path.join(directory, CONFIG), "what diffusers saves beside the tensors")
    files, index = _files(directory)
    found: dict[str, Stored] = {}
    headers = {}
    for file, wanted in files.items():
        stored, headers[os.path.basename(file)] = tensors.header(file)
        _check_names(file, stored, wanted)
        found |= stored
    return Checkpoint(directory, config, found, headers, index)


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


def check_new(path: str) -> None:
    """Raises ConfigError if something is at `path` but an empty directory."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{path}: a file; expected a new directory")
    if os.path.isdir(path) and (there := sorted(os.listdir(path))):
        raise ConfigError(f"{path}: expected a new or an empty directory, it holds {there[0]}")


@contextlib.contextmanager
def new_directory(path: str, size: int = 0) -> Iterator[str]:
    """A directory to fill, which is at `path` once the block ends, whole, or not at all.

    Raises ConfigError if something is there already, if nothing can be written there, or not so many bytes.
    """
    path = os.path.abspath(path)
    check_new(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a place that can be written") from None
    try:
        if size > (free := shutil.disk_usage(made).free):
            raise ConfigError(
                f"{path}: {size / 2**30:.3g} GiB are to be written, {free / 2**30:.3g} GiB are free there"
            )
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


def _files(directory: str) -> tuple[dict[str, set[str] | None], tuple[str, str] | None]:
    """(files that hold the tensors → names that must be in each, None where no index says; the index)."""
    names = sorted(os.listdir(directory))
    whole = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(INDEX)]
    for plain in (TENSORS, TRANSFORMERS):  # as diffusers does: the plain name before an index, both before a variant
        if plain in whole:
            return {os.path.join(directory, plain): None}, None
        default = plain.removesuffix(".safetensors") + INDEX
        if default in indexes:
            return _indexed(directory, default)
    if len(indexes) == 1:
        return _indexed(directory, indexes[0])
    if len(whole) == 1 and not indexes:
        return {os.path.join(directory, whole[0]): None}, None
    if whole:
        raise ConfigError(f"{directory}: expected one {TENSORS} or an index of several, found {', '.join(whole[:4])}")
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise _pickle(os.path.join(directory, pickles[0]))
    raise ConfigError(f"{directory}: no tensors; expected {TENSORS} or {TENSORS.removesuffix('.safetensors') + INDEX}")


def _indexed(directory: str, name: str) -> tuple[dict[str, set[str] | None], tuple[str, str]]:
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
    with open(path, encoding="utf-8", newline="") as f:
        return files, (name, f.read())


def _check_names(file: str, stored: Mapping[str, Stored], wanted: set[str] | None) -> None:
    """Raises ConfigError unless a file has the names that an index expects there, in dtypes that are read."""
    if wanted is not None and (odd := sorted(wanted ^ stored.keys())):
        raise ConfigError(
            f"{file}: {'lacks' if odd[0] in wanted else 'has'} {odd[0]}, the index of the directory says otherwise"
        )
    for name, array in stored.items():
        if array.dtype not in DTYPES:
            known = ", ".join(tensors.CODES[dtype] for dtype in DTYPES)
            code = tensors.CODES[array.dtype]
            raise ConfigError(f"{file}: {name} is of dtype {code}; expected {known} (not quantised)")


def _pickle(path: str) -> ConfigError:
    return ConfigError(
        f"{path}: a pickle, which can run code, so it is not read; expected safetensors, as diffusers writes: "
        "CLASS.from_pretrained(DIR), or .from_single_file(FILE) of a model's own, then .save_pretrained(OUT)"
    )
