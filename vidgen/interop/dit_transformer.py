"""diffusers' `DiTTransformer2DModel`, the DiT of arXiv:2212.09748 on images of a class: settings, names, calls.

It is the packed DiT (`vidgen/models/dit.py`) with these settings of `config.model`: no text; labels; biases; fixed
sinusoids for places and no rotary embedding; no norm of queries and keys. Two numbers are diffusers' own: the longest
wavelength of noise levels, since it spreads 128 waves over 127 steps, and eps of the norm before the MLP.

Each block there has an embedding of noise levels and labels of its own. The published weights have one, written into
every block, and then so has our model (`settle`); where blocks differ, ours keeps one for each (`level_per_block`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError, base
from vidgen.geometry import patchify, unpatchify
from vidgen.interop import packed
from vidgen.interop.checkpoint import Checkpoint
from vidgen.interop.names import Entry
from vidgen.models import architecture
from vidgen.models.architecture import Architecture
from vidgen.models.conditions import SINUSOIDS

KIND = packed.KIND
CLASS = "DiTTransformer2DModel"

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
# What the module has one way of. Scores are always in float32 here, so upcast_attention changes nothing.
FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
# Of `config.model`, what all of the class have in common.
COMMON: dict[str, Any] = {
    "backbone": "dit",
    "bias": True,
    "qk_norm": "none",
    "rope": False,
    "level_theta": 10_000.0 ** (SINUSOIDS / 2 / (SINUSOIDS / 2 - 1)),
    "absolute": "sincos",
    "cross": False,
    "cross_norm": False,
    "final": "modulation",
    "cond": 0,
    "image_width": 0,
    "image_tokens": 0,
    "shared_modulation": False,
    "text_mlp": False,
}

# Our layers and what they are called there; `{}` is the number of a block.
LAYERS = {
    "embed": "pos_embed.proj",
    "final_modulation": "proj_out_1",
    "head": "proj_out_2",
    "blocks/modulation": "transformer_blocks.{}.norm1.linear",
    "blocks/attention/query": "transformer_blocks.{}.attn1.to_q",
    "blocks/attention/key": "transformer_blocks.{}.attn1.to_k",
    "blocks/attention/value": "transformer_blocks.{}.attn1.to_v",
    "blocks/attention/out": "transformer_blocks.{}.attn1.to_out.0",
    "blocks/mlp/up": "transformer_blocks.{}.ff.net.0.proj",
    "blocks/mlp/down": "transformer_blocks.{}.ff.net.2",
}
# In each block there; here, in each (below `levels/`) or once.
EMBEDDERS = {
    "level_in": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "level_out": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
}
LABELS = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


def read_config(config: Mapping[str, Any], file: str) -> Architecture:
    """The architecture that diffusers' settings ask for, with an embedding of noise levels in each block.

    Raises ConfigError for a setting that this module does not have, by its name; `file` is where they stand.
    """
    c = packed.settings_of(config, DEFAULTS, CLASS, file)
    for key, value in FIXED.items():
        if c[key] != value:
            raise ConfigError(f"{file}: {key}={c[key]!r} is not implemented; expected {value!r}")
    for key in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size"):
        packed.natural(c[key], key, file)
    packed.natural(c["num_embeds_ada_norm"], "num_embeds_ada_norm", file)
    if c["out_channels"] not in (None, c["in_channels"], 2 * c["in_channels"]):
        raise ConfigError(
            f"{file}: out_channels={c['out_channels']!r}: expected in_channels={c['in_channels']}, or twice as many "
            "with the variance"
        )
    if not isinstance(c["norm_eps"], int | float) or not 0 < c["norm_eps"] < 1:
        raise ConfigError(f"{file}: norm_eps={c['norm_eps']!r}: expected a small number above 0")
    heads, head, patch = c["num_attention_heads"], c["attention_head_dim"], c["patch_size"]
    width, side = heads * head, c["sample_size"] // patch
    if head % 2 or width % 4:
        raise ConfigError(
            f"{file}: attention_head_dim={head}: expected an even number, {heads} times which divides by 4"
        )
    if not side:
        raise ConfigError(f"{file}: sample_size={c['sample_size']}: expected patch_size={patch} or more")
    model = base().model
    model.update(
        COMMON
        | {
            "width": width,
            "layers": c["num_layers"],
            "heads": heads,
            "mlp_dim": 4 * width,
            "mlp_eps": float(c["norm_eps"]),
            "table": (1, side, side),
            "classes": c["num_embeds_ada_norm"],
            "level_per_block": True,
            "learned_sigma": c["out_channels"] == 2 * c["in_channels"],
        }
    )
    return architecture.of(model, (1, patch, patch), c["in_channels"], 0)


def settle(config: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The architecture with one embedding of noise levels and labels, if all blocks of the files have the same."""
    keys = [f"{key}.{leaf}" for key in EMBEDDERS.values() for leaf in ("weight", "bias")] + [LABELS]
    for key in keys:
        first, *rest = (key.format(layer) for layer in range(config["layers"]))
        if first not in checkpoint.tensors:  # reading them says what is missing
            return config
        array = checkpoint.read(first)
        if any(other in checkpoint.tensors and not np.array_equal(checkpoint.read(other), array) for other in rest):
            return config
    return _replace(config, level_per_block=False)


def _replace(config: Architecture, **changes: Any) -> Architecture:
    return dataclasses.replace(config, model=tuple((dict(config.model) | changes).items()))


def write_config(config: Architecture) -> dict[str, Any]:
    """Inverse of `read_config`: all of diffusers' settings; raises ConfigError for what this class does not have."""
    packed.refuse_other(config, COMMON, CLASS)
    width, (t, patch, across) = config["width"], config.patch
    if t != 1 or patch != across:
        raise ConfigError(f"config.tokenizer.patch={config.patch}: diffusers' {CLASS} has patches (1, n, n)")
    if config["mlp_dim"] != 4 * width:
        raise ConfigError(f"config.model.mlp_dim={config['mlp_dim']}: diffusers' {CLASS} has {4 * width}, 4 · width")
    if not config["classes"]:
        raise ConfigError(f"config.model.classes=0: diffusers' {CLASS} has 1 or more")
    if (table := config["table"] or (1, 0, 0))[0] != 1 or table[1] != table[2] or not table[1]:
        raise ConfigError(f"config.model.table={config['table']}: diffusers' {CLASS} has (1, n, n)")
    return {
        "num_attention_heads": config["heads"],
        "attention_head_dim": width // config["heads"],
        "in_channels": config.channels,
        "out_channels": (2 if config["learned_sigma"] else 1) * config.channels,
        "num_layers": config["layers"],
        "dropout": 0.0,
        "norm_num_groups": 32,
        "attention_bias": True,
        "sample_size": table[1] * patch,
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config["classes"],
        "upcast_attention": False,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": config["mlp_eps"],
    }


@functools.lru_cache(maxsize=8)
def entries(config: Architecture) -> tuple[Entry, ...]:
    """Every tensor of a transformer of this architecture under both names.

    With one embedding of noise levels here, its arrays have as many keys as there are blocks.
    """
    found: list[Entry] = []
    blocks = range(config["layers"])
    cells = config.patch[1] * config.patch[2]
    for path, shape in sorted(packed.shapes(config).items()):
        layer, leaf = path.rsplit("/", 1) if "/" in path else ("", path)
        end = "bias" if leaf == "bias" else "weight"
        embedder, stacked = layer.removeprefix("levels").removeprefix("/"), layer.startswith(("blocks", "levels"))
        if stacked:
            shape = shape[1:]
        if embedder in EMBEDDERS or leaf == "class_embedding":
            key = LABELS if leaf == "class_embedding" else f"{EMBEDDERS[embedder]}.{end}"
            stored = shape if leaf == "class_embedding" else shape[::-1]
            found += [Entry(path, shape, key.format(i), stored, i if stacked else None) for i in blocks]
            continue
        key, stored, outputs = f"{LAYERS[layer]}.{end}", shape[::-1], None
        if path == "embed/kernel":
            stored = (config["width"], config.channels, *config.patch[1:])
        if layer == "head" and config["learned_sigma"]:  # prediction and variance of each latent side by side there
            outputs = packed.noisy_first(config.channels, 2 * config.channels, cells)
        found += [Entry(path, shape, key.format(i), stored, i, None, outputs) for i in (blocks if stacked else (None,))]
    assert len({entry.key for entry in found}) == len(found), "two parameters under one name"
    return tuple(found)


class DiTTransformer(packed.Transformer):
    """A `DiTTransformer2DModel`."""

    DEFAULTS = DEFAULTS

    def __call__(self, hidden_states: np.ndarray, timestep: np.ndarray, class_labels: np.ndarray) -> np.ndarray:
        """The prediction, and behind it the variance if that is learned: [B,out_channels,H,W] f32.

        Images of another size than `sample_size` get its positions, spread evenly, as in diffusers; only here they need
        not be squares.

        Args:
          hidden_states: [B,in_channels,H,W], H and W multiples of patch_size.
          timestep: [B], 0 to 1000, not only whole numbers.
          class_labels: [B] integers; num_embeds_ada_norm is the label for none.

        Raises ValueError for other shapes, labels that there are not, and NaN or infinity.
        """
        c, patch = self.architecture, self.architecture.patch
        x = packed.checked(hidden_states, "hidden_states", (None, c.channels, None, None))
        rows, size = len(x), x.shape[2:]
        if any(n % patch[1] for n in size):
            raise ValueError(f"hidden_states of {list(size)}: expected multiples of patch_size={patch[1]}")
        labels = np.asarray(class_labels)
        if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"class_labels of {labels.dtype} {list(labels.shape)}: expected integers [{rows}]")
        if np.any((labels < 0) | (labels > c["classes"])):
            raise ValueError(f"class_labels {labels.min()} to {labels.max()}: expected 0 to {c['classes']}")
        grid = (1, size[0] // patch[1], size[1] // patch[1])
        coords = packed.grid_coords(grid) * (np.asarray(c["table"], np.float32) / np.asarray(grid, np.float32))
        tokens = len(coords)
        levels, level = packed.levels_of(np.broadcast_to(np.asarray(timestep), (rows,)), rows, tokens)
        batch = TokenBatch(
            tokens=None,
            coords=np.broadcast_to(coords, (rows, tokens, 3)),
            segment=np.ones((rows, tokens), np.int32),
            level=level,
            vectors=labels.astype(np.float32)[:, None, None],
        )
        noisy = patchify(np.moveaxis(x, 1, -1)[:, None], patch)
        out = np.asarray(packed.predict(self.module, self.params, noisy, levels, batch, with_sigma=True))
        parts = np.split(out, 2, axis=-1) if c["learned_sigma"] else [out]
        images = [unpatchify(part, grid, patch)[:, 0] for part in parts]
        return np.ascontiguousarray(np.moveaxis(np.concatenate(images, axis=-1), -1, 1))
