"""Low-rank updates as files in the style of PEFT, which `load_lora_weights` of a pipeline of diffusers reads.

A layer `blocks.0.attn1.to_q` has `transformer.blocks.0.attn1.to_q.lora_A.weight` [rank, in] and `….lora_B.weight`
[out, rank]. Rank and alpha stand in the file's metadata, as JSON under `lora_adapter_metadata`, which diffusers gives
to `peft.LoraConfig`; files without it have an alpha equal to the rank.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import tensors
from vidgen.config import ConfigError
from vidgen.interop import diffusers
from vidgen.interop.names import Entry
from vidgen.models.architecture import Architecture
from vidgen.weights import PICKLES, flatten, nest, write_safetensors

FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a directory
METADATA = "lora_adapter_metadata"
PREFIX = "transformer."
HALVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def write(
    directory: str, params: Mapping[str, Any], architecture: Architecture, c: ConfigDict
) -> dict[str, np.ndarray]:
    """Writes the updates of a denoiser into a directory that is there; returns what the file holds, {key: array}.

    Args:
      params: a tree of updates and nothing else, "…/lora_a" […, in, rank] and "…/lora_b" […, rank, out].
      architecture: of the denoiser.
      c: `config.lora`: updates are scaled by alpha / rank.

    Raises ConfigError for a denoiser that diffusers has no class for, and for updates of what is no matrix there;
    OSError.
    """
    stored, text = encode(params, architecture, c)
    write_safetensors(os.path.join(directory, FILE), stored, {"format": "pt", METADATA: text})
    return stored


def encode(params: Mapping[str, Any], architecture: Architecture, c: ConfigDict) -> tuple[dict[str, np.ndarray], str]:
    """({key: array}, metadata as JSON) of a file; as `write`."""
    flat = flatten(params)
    if odd := [path for path in flat if not path.endswith(tuple(HALVES))]:
        raise ConfigError(
            f"{odd[0]} trained beside the low-rank updates, and a file of updates can't have it; merge them instead"
        )
    stored, modules = {}, []
    kernels = _kernels(entries_of(architecture))
    for layer in sorted({path.rpartition("/")[0] for path in flat}):
        if layer not in kernels:
            raise ConfigError(f"{layer}: a low-rank update of what is no matrix in diffusers; it can only be merged")
        a, b = (np.asarray(flat[f"{layer}/{half}"]) for half in HALVES)
        for entry in kernels[layer]:
            module = entry.key.removesuffix(".weight")
            own = (a, b) if entry.layer is None else (a[entry.layer], b[entry.layer])
            modules.append(module)
            for half, array in zip(HALVES.values(), _ordered(entry, *own, back=True), strict=True):
                stored[f"{PREFIX}{module}.{half}"] = np.ascontiguousarray(array.T)
    about = {"r": c.rank, "lora_alpha": c.alpha or float(c.rank), "target_modules": modules, "bias": "none"}
    return stored, json.dumps({f"{PREFIX}{name}": value for name, value in about.items()}, indent=2, sort_keys=True)


def entries_of(architecture: Architecture) -> tuple[Entry, ...]:
    """The parameters of a denoiser under both names, as a class of diffusers has them; raises ConfigError."""
    reasons = []
    for row in diffusers.CLASSES.values():
        if row.kind == "denoiser":
            try:
                row.write_config(architecture)
            except ConfigError as e:
                reasons.append(str(e))
            else:
                return row.entries(architecture, ())
    raise ConfigError(f"no class of diffusers is for this denoiser: {'; '.join(reasons)}")


def read(path: str, architecture: Architecture) -> tuple[dict[str, Any], int, float]:
    """(updates as `write` takes them, f32; rank; alpha) of a file, or of a directory that has it under diffusers' name.

    Of a stack of which only some layers have updates, the others' are zero. Raises ConfigError: a pickle, a file that
    is cut or isn't there, keys that belong to no matrix of the model, half an update, shapes that don't fit, more than
    one rank, updates that are no finite numbers.
    """
    path = os.path.join(path, FILE) if os.path.isdir(path) else path
    if path.lower().endswith(PICKLES):
        raise ConfigError(f"{path}: a pickle can run code and is never read; expected a safetensors file")
    headers, text = tensors.header(path)
    metadata = json.loads(text).get("__metadata__", {})
    kernels = _kernels(entries_of(architecture))
    names = {entry.key.removesuffix(".weight"): entry for rows in kernels.values() for entry in rows}
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, stored in headers.items():
        module, half = _parsed(key, path)
        if module not in names:
            near = difflib.get_close_matches(module, names, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"{path}: {key} is of no matrix of this model{hint}")
        array = stored.read().astype(np.float32)
        if array.ndim != 2 or not np.isfinite(array).all():
            what = f"shape {list(array.shape)}, expected two axes" if array.ndim != 2 else "NaN or infinity"
            raise ConfigError(f"{path}: {key} has {what}")
        halves.setdefault(module, {})[half] = array.T
    ranks = {array.shape[-1] for found in halves.values() if (array := found.get("lora_a")) is not None}
    if len(ranks) != 1:
        raise ConfigError(f"{path}: low-rank updates of ranks {sorted(ranks)}; expected some, of one rank")
    rank = ranks.pop()
    flat: dict[str, np.ndarray] = {}
    for module, found in halves.items():
        entry = names[module]
        inputs, outputs = entry.stored[1], entry.stored[0]
        for half, shape in (("lora_a", (inputs, rank)), ("lora_b", (rank, outputs))):
            if half not in found or found[half].shape != shape:
                has = "no" if half not in found else f"{list(found[half].shape[::-1])} as"
                raise ConfigError(f"{path}: {has} {module}.{HALVES[half]}; expected shape {list(shape[::-1])}")
        layer = entry.path.removesuffix("/kernel")
        for half, array in zip(HALVES, _ordered(entry, found["lora_a"], found["lora_b"], back=False), strict=True):
            _put(flat, f"{layer}/{half}", entry, array, len(kernels[layer]))
    return nest(flat), rank, _alpha(metadata, rank, path)


def _kernels(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Our layer → the matrices that it is there, one a layer of a stack: [out, in] there and [in, out] here."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.path.endswith("/kernel") and entry.key.endswith(".weight") and len(entry.stored) == 2:
            found.setdefault(entry.path.removesuffix("/kernel"), []).append(entry)
    return found


def _ordered(entry: Entry, a: np.ndarray, b: np.ndarray, back: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a [in,r] and outputs of b [r,out] in our order, or `back` in theirs."""
    if entry.inputs is not None:
        a = np.take(a, np.argsort(entry.inputs) if back else entry.inputs, axis=0)
    if entry.outputs is not None:
        b = np.take(b, np.argsort(entry.outputs) if back else entry.outputs, axis=1)
    return a, b


def _put(flat: dict[str, np.ndarray], path: str, entry: Entry, array: np.ndarray, layers: int) -> None:
    if entry.layer is None:
        flat[path] = array
    else:
        flat.setdefault(path, np.zeros((layers, *array.shape), np.float32))[entry.layer] = array


def _parsed(key: str, path: str) -> tuple[str, str]:
    """(module, lora_a or lora_b) of a key."""
    for half, ending in HALVES.items():
        if key.endswith(f".{ending}"):
            return key.removeprefix(PREFIX).removesuffix(f".{ending}"), half
    raise ConfigError(f"{path}: {key} is no low-rank update; expected {PREFIX}LAYER.{' or .'.join(HALVES.values())}")


def _alpha(metadata: Mapping[str, str], rank: int, path: str) -> float:
    if METADATA not in metadata:
        return float(rank)
    try:
        about = {name.removeprefix(PREFIX): value for name, value in json.loads(metadata[METADATA]).items()}
        if about["r"] != rank or about.get("rank_pattern") or about.get("alpha_pattern") or about.get("use_rslora"):
            raise ConfigError(
                f"{path}: metadata of rank {about['r']}, with patterns or rsLoRA; expected rank {rank} alone"
            )
        return float(about["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path}: its {METADATA} is not what PEFT writes ({type(e).__name__}: {e})") from None
