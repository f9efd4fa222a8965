"""What a device holds at the peak of a step, from shapes alone: an estimate, where the compiler knows the facts."""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from vidgen.models import remat
from vidgen.models.architecture import mlp_dim
from vidgen.planning.parameters import block_parameters, parameters, row_tokens
from vidgen.planning.traffic import MASTER, number, shards, split_attention, state_bytes, trained

HEADROOM = 0.9  # share of the memory that an estimate may fill


@functools.lru_cache(maxsize=64)
def held(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(names that blocks keep on the device, names that wait on the host), of `config.model.remat`."""
    actions = remat.parse(text)
    away = frozenset(name for name, action in actions.items() if action == "offload")
    return remat.saved(text) - away, away


def kept_bytes(config: ConfigDict, tensor: int) -> dict[str, float]:
    """Bytes a token that a block holds for the backward pass if it keeps a tensor, by name; in pieces over tensor."""
    m = config.model
    wide = number(config) * m.width
    found = dict.fromkeys(("attention_norm", "attention_project", "cross_project", "mlp_down"), wide)
    found["residual"] = (2 if m.residual == "bfloat16" else 4) * m.width
    pieces = dict.fromkeys(("query", "key", "value", "attention_out", "cross_query", "cross_out"), wide)
    pieces |= {"attention_lse": 4 * m.heads, "cross_lse": 4 * m.heads}
    pieces["mlp_up"] = number(config) * mlp_dim(m)
    return found | {name: size / tensor for name, size in pieces.items()}


def tokens_of_a_device(config: ConfigDict, mesh: dict[str, int]) -> float:
    """In a step, all microbatches."""
    return config.rows.count * row_tokens(config) / (mesh["data"] * mesh["fsdp"] * mesh["context"])


def host_bytes(config: ConfigDict, mesh: dict[str, int]) -> float:
    """What a device sends to its host's memory in a step, and gets back."""
    sizes, (_, away) = kept_bytes(config, mesh["tensor"]), held(config.model.remat)
    return config.model.layers * tokens_of_a_device(config, mesh) * sum(sizes.get(name, 0.0) for name in away)


def training_parts(
    config: ConfigDict, features: int, mesh: dict[str, int], strategy: str, ulysses: int = 0
) -> dict[str, float]:
    """What a device holds at the peak of a training step: what it is → bytes.

    Args:
      features: P, width of a token.
      strategy, ulysses: of attention over context, as in `config.mesh`.
    """
    m, everything = config.model, config.model.remat == "none"
    accumulate, tensor = config.optimizer.accumulate, mesh["tensor"]
    local = tokens_of_a_device(config, mesh) / accumulate
    kept = {f"{name} of all layers": m.layers * local * size for name, size in kept_bytes(config, tensor).items()
            if name in held(m.remat)[0]}  # fmt: skip
    if m.backbone == "uvit":
        kept["long skips"] = m.layers // 2 * local * kept_bytes(config, tensor)["residual"]
    return kept | {
        "weights, their average and the optimizer's moments": state_bytes(config, features, mesh),
        "gradients": MASTER * trained(config, features) / shards(config, mesh) * (2 if accumulate > 1 else 1),
        "what has no name, of all layers": m.layers * local * _unnamed(config) if everything else 0.0,
        # This block's and the next's, gathered, and a gradient in float32.
        "gathered weights": (2 * number(config) + MASTER) * block_parameters(config) / tensor,
        "one block at work": local * _block_at_work(config, tensor),
        "keys and values of other devices": _exchanged(config, mesh, strategy, ulysses, MASTER) / accumulate,
        "tokens, noise and the two ends": local * (2 * features * 4 + 3 * 4 * m.width),
    }


def drawing_parts(
    config: ConfigDict, features: int, mesh: dict[str, int], strategy: str, ulysses: int = 0
) -> dict[str, float]:
    """As `training_parts`, while clips are drawn."""
    local, tensor = tokens_of_a_device(config, mesh), mesh["tensor"]
    return {
        "weights": MASTER * parameters(config, features) / shards(config, mesh),
        "gathered weights": 2 * number(config) * block_parameters(config) / tensor,
        "activations: one block at work": local * _block_at_work(config, tensor) / 2,  # no gradients beside them
        "keys and values of other devices": _exchanged(config, mesh, strategy, ulysses, 0),
        "tokens, noise and the two ends": local * (4 * features * 4 + 3 * 4 * config.model.width),
    }


def _unnamed(config: ConfigDict) -> float:
    """Bytes a token, float32: the modulation picked for tokens (6), norms and sums between the named tensors (6)."""
    return 12 * 4 * config.model.width


def _block_at_work(config: ConfigDict, tensor: int) -> float:
    """Bytes a token of what a block makes on its way, and its gradients."""
    m = config.model
    return 2 * _unnamed(config) + number(config) * (12 * m.width + 4 * mlp_dim(m)) / tensor


def _exchanged(config: ConfigDict, mesh: dict[str, int], strategy: str, ulysses: int, gradient: int) -> float:
    """Bytes of keys and values of all rows of a device that come from others; `gradient`: bytes of a number of it."""
    inner, outer = split_attention(config, mesh, strategy, ulysses)
    rows = config.rows.count / (mesh["data"] * mesh["fsdp"])
    keys = 2 * rows * row_tokens(config) * config.model.width / mesh["tensor"] / inner  # numbers, of all tokens
    sizes = {
        "gather": (number(config) + gradient) * keys,
        "ring": 2 * (MASTER + 3 * gradient) * keys / (mesh["context"] // inner),
    }
    return sizes.get(outer, 0.0)
