"""Low-rank updates as a file in the style of PEFT, which `load_lora_weights` of a pipeline of diffusers reads.

A layer `blocks.0.attn1.to_q` has `transformer.blocks.0.attn1.to_q.lora_A.weight` [rank, in] and `….lora_B.weight`
[out, rank]. Rank and alpha stand in the file's metadata, as JSON under `lora_adapter_metadata`, which diffusers gives
to `peft.LoraConfig`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.interop import diffusers
from vidgen.interop.names import Entry
from vidgen.models.architecture import Architecture
from vidgen.weights import flatten, write_safetensors

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
            for half, array in zip(HALVES.values(), _theirs(entry, *own), strict=True):
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


def _kernels(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Our layer → the matrices that it is there, one a layer of a stack: [out, in] there and [in, out] here."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.path.endswith("/kernel") and entry.key.endswith(".weight") and len(entry.stored) == 2:
            found.setdefault(entry.path.removesuffix("/kernel"), []).append(entry)
    return found


def _theirs(entry: Entry, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a [in,r] and outputs of b [r,out] in their order."""
    if entry.inputs is not None:
        a = np.take(a, np.argsort(entry.inputs), axis=0)
    if entry.outputs is not None:
        b = np.take(b, np.argsort(entry.outputs), axis=1)
    return a, b
