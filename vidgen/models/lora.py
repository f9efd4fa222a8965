"""Low-rank updates of frozen matrices (LoRA, Hu et al., arXiv:2106.09685), as parameters beside them.

A model knows nothing of them: `Linear` uses a `lora_a` and a `lora_b` where it finds them beside its kernel.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.weights import flatten, nest

NAMES = ("lora_a", "lora_b")


def is_low_rank(path: str) -> bool:
    """Whether a parameter's path is of a low-rank update."""
    return path.endswith(NAMES)


def scale(c: ConfigDict) -> float:
    """alpha / rank of `config.lora`, by which updates are multiplied; 1 where alpha is 0."""
    return c.alpha / c.rank if c.alpha else 1.0


def check(c: ConfigDict) -> None:
    """Raises ConfigError on targets that are no regular expression."""
    try:
        re.compile(c.targets)
    except re.error as e:
        raise ConfigError(f"config.lora.targets={c.targets!r}: not a regular expression ({e})") from None


def targets(params: Mapping[str, Any], pattern: str) -> tuple[str, ...]:
    """The layers, such as "blocks/attention/query", that a regex is found in; raises ConfigError where it is in none.

    Layers are what has a kernel [in, out], or [layers, in, out] where they are stacked.
    """
    layers = [
        p.removesuffix("/kernel") for p, x in flatten(params).items() if p.endswith("/kernel") and x.ndim in (2, 3)
    ]
    found = tuple(layer for layer in layers if re.search(pattern, layer))
    if not found:
        some = ", ".join(near(pattern, layers))
        raise ConfigError(f"config.lora.targets={pattern!r}: matches no layer; there are, for example, {some}")
    return found


def near(pattern: str, paths: Iterable[str]) -> list[str]:
    """The three of the paths that have words most like those of a regex that is found in none."""
    words = re.findall(r"\w+", pattern) or [""]

    def likeness(path: str) -> float:
        own = path.split("/")
        return sum(max(difflib.SequenceMatcher(None, word, part).ratio() for part in own) for word in words)

    return sorted(paths, key=likeness, reverse=True)[:3]


def add(key: jax.Array, params: Mapping[str, Any], c: ConfigDict) -> dict[str, Any]:
    """`params` with an update of rank `config.lora.rank` beside the kernel of each target, f32.

    `lora_a` […, in, rank] is normal with variance 1 / in, `lora_b` […, rank, out] zero, so that nothing changes at
    first. Raises ConfigError for targets that match nothing, and for a rank above the smaller side of one.
    """
    flat = flatten(params)
    for layer in targets(params, c.targets):
        *stack, inputs, outputs = flat[f"{layer}/kernel"].shape
        if c.rank > min(inputs, outputs):
            raise ConfigError(
                f"config.lora.rank={c.rank}: {layer} is [{inputs}, {outputs}]; nearest: {min(inputs, outputs)}"
            )
        own = jax.random.fold_in(key, zlib.crc32(layer.encode()))
        flat[f"{layer}/lora_a"] = jax.random.normal(own, (*stack, inputs, c.rank)) / inputs**0.5
        flat[f"{layer}/lora_b"] = jnp.zeros((*stack, c.rank, outputs))
    return nest(flat)


def scaled(params: Mapping[str, Any], by: float) -> dict[str, Any]:
    """`params` with their updates multiplied by alpha / rank: what a model is to be called with."""
    if by == 1.0:
        return dict(params)
    return nest({path: x * by if path.endswith("lora_b") else x for path, x in flatten(params).items()})


def merged(params: Mapping[str, Any], by: float) -> dict[str, Any]:
    """`params` with each kernel replaced by kernel + by · lora_a · lora_b, in float32, and without the updates.

    Of NumPy arrays, NumPy arrays. Raises ConfigError for an update without its kernel or its other half.
    """
    flat = flatten(params)
    whole = {path: x for path, x in flat.items() if not is_low_rank(path)}
    for path in flat:
        if not is_low_rank(path):
            continue
        layer = path.rpartition("/")[0]
        if missing := [n for n in ("kernel", *NAMES) if f"{layer}/{n}" not in flat]:
            raise ConfigError(f"{path}: no {layer}/{missing[0]} beside it")
        if path.endswith("lora_a"):
            update = flat[path] @ flat[f"{layer}/lora_b"]
            whole[f"{layer}/kernel"] = flat[f"{layer}/kernel"] + by * update
    return nest(whole)
