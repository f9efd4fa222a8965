"""diffusers' `WanTransformer3DModel`, the denoiser of Wan 2.1 (arXiv:2503.20314) and 2.2: settings, names, calls.

It is the packed DiT (`vidgen/models/dit.py`) with these settings of `config.model`: one modulation layer for all blocks
and a table in each; biases; queries and keys normed over all heads jointly; a norm with weights before cross-attention;
text through two matrices; shift and scale of the end from a table; places told by the rotary embedding alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError, base
from vidgen.geometry import patchify, unpatchify
from vidgen.interop import packed
from vidgen.interop.names import Entry
from vidgen.models import architecture
from vidgen.models.architecture import Architecture
from vidgen.models.conditions import SINUSOIDS

KIND = packed.KIND
CLASS = "WanTransformer3DModel"

DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
# What the module has one way of, or reads nowhere.
FIXED = {"freq_dim": SINUSOIDS, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}
OPTIONAL = ("out_channels", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")  # may be null
# Of `config.model`, what all of the class have in common.
COMMON: dict[str, Any] = {
    "backbone": "dit",
    "mlp_eps": 1e-6,
    "bias": True,
    "qk_norm": "joint",
    "rope": True,
    "rope_theta": 10_000.0,
    "level_theta": 10_000.0,
    "absolute": "none",
    "table": (),
    "cross": True,
    "cross_norm": True,
    "final": "table",
    "classes": 0,
    "level_per_block": False,
    "learned_sigma": False,
    "shared_modulation": True,
    "text_mlp": True,
}

# Our layers and what they are called there; `{}` is the number of a block.
LAYERS = {
    "embed": "patch_embedding",
    "level_in": "condition_embedder.time_embedder.linear_1",
    "level_out": "condition_embedder.time_embedder.linear_2",
    "modulation": "condition_embedder.time_proj",
    "text_in": "condition_embedder.text_embedder.linear_1",
    "text_out": "condition_embedder.text_embedder.linear_2",
    "image/norm_in": "condition_embedder.image_embedder.norm1",
    "image/up": "condition_embedder.image_embedder.ff.net.0.proj",
    "image/down": "condition_embedder.image_embedder.ff.net.2",
    "image/norm_out": "condition_embedder.image_embedder.norm2",
    "head": "proj_out",
    "blocks/attention/query": "blocks.{}.attn1.to_q",
    "blocks/attention/key": "blocks.{}.attn1.to_k",
    "blocks/attention/value": "blocks.{}.attn1.to_v",
    "blocks/attention/out": "blocks.{}.attn1.to_out.0",
    "blocks/attention/query_norm": "blocks.{}.attn1.norm_q",
    "blocks/attention/key_norm": "blocks.{}.attn1.norm_k",
    "blocks/cross_norm": "blocks.{}.norm2",
    "blocks/cross/query": "blocks.{}.attn2.to_q",
    "blocks/cross/key": "blocks.{}.attn2.to_k",
    "blocks/cross/value": "blocks.{}.attn2.to_v",
    "blocks/cross/out": "blocks.{}.attn2.to_out.0",
    "blocks/cross/query_norm": "blocks.{}.attn2.norm_q",
    "blocks/cross/key_norm": "blocks.{}.attn2.norm_k",
    "blocks/cross/image_key": "blocks.{}.attn2.add_k_proj",
    "blocks/cross/image_value": "blocks.{}.attn2.add_v_proj",
    "blocks/cross/image_key_norm": "blocks.{}.attn2.norm_added_k",
    "blocks/mlp/up": "blocks.{}.ffn.net.0.proj",
    "blocks/mlp/down": "blocks.{}.ffn.net.2",
}
# Tables, whose rows are one axis more there.
TABLES = {
    "final_table": ("scale_shift_table", 2),
    "blocks/modulation_table": ("blocks.{}.scale_shift_table", 6),
    "image/place_table": ("condition_embedder.image_embedder.pos_embed", 0),
}


def read_config(config: Mapping[str, Any], file: str) -> Architecture:
    """The architecture that diffusers' settings ask for.

    Raises ConfigError for a setting that this module does not have, by its name; `file` is where they stand.
    """
    c = packed.settings_of(config, DEFAULTS, CLASS, file)
    for key, value in FIXED.items():
        if c[key] != value:
            raise ConfigError(f"{file}: {key}={c[key]!r} is not implemented; expected {value!r}")
    for key in DEFAULTS:
        if key not in FIXED and key != "patch_size" and not (key in OPTIONAL and c[key] is None):
            packed.natural(c[key], key, file)
    if not isinstance(c["patch_size"], list | tuple) or len(c["patch_size"]) != 3:
        raise ConfigError(f"{file}: patch_size={c['patch_size']!r}: expected three whole numbers, like [1, 2, 2]")
    for size in c["patch_size"]:
        packed.natural(size, "patch_size", file)
    heads, head = c["num_attention_heads"], c["attention_head_dim"]
    width, out = heads * head, c["out_channels"] or c["in_channels"]
    if head < 6 or head % 2:
        raise ConfigError(
            f"{file}: attention_head_dim={head}: expected an even number of at least 6, pairs for t, y, x"
        )
    if c["in_channels"] < out:
        raise ConfigError(f"{file}: in_channels={c['in_channels']}: expected out_channels={out} or more of them")
    if c["image_dim"] and c["added_kv_proj_dim"] != width or not c["image_dim"] and c["added_kv_proj_dim"]:
        wanted = f"{width}, heads · head_dim" if c["image_dim"] else "null"
        raise ConfigError(
            f"{file}: added_kv_proj_dim={c['added_kv_proj_dim']!r} with image_dim={c['image_dim']!r}: expected {wanted}"
        )
    if c["pos_embed_seq_len"] and not c["image_dim"]:
        raise ConfigError(f"{file}: pos_embed_seq_len={c['pos_embed_seq_len']}: expected null without image_dim")
    if (c["pos_embed_seq_len"] or 0) % 2:
        raise ConfigError(f"{file}: pos_embed_seq_len={c['pos_embed_seq_len']}: expected an even number, two images")
    patch, side = tuple(c["patch_size"]), head // 6
    model = base().model
    model.update(
        COMMON
        | {
            "width": width,
            "layers": c["num_layers"],
            "heads": heads,
            "mlp_dim": c["ffn_dim"],
            "rope_pairs": (head // 2 - 2 * side, side, side),
            "cond": (c["in_channels"] - out) * math.prod(patch),
            "image_width": c["image_dim"] or 0,
            "image_tokens": c["pos_embed_seq_len"] or 0,
        }
    )
    return architecture.of(model, patch, out, c["text_dim"])


def write_config(config: Architecture) -> dict[str, Any]:
    """Inverse of `read_config`: all of diffusers' settings; raises ConfigError for what this class does not have."""
    packed.refuse_other(config, COMMON, CLASS)
    head, cells = config["width"] // config["heads"], math.prod(config.patch)
    pairs = (head // 2 - 2 * (head // 6), head // 6, head // 6)
    if config["rope_pairs"] != pairs:
        raise ConfigError(f"config.model.rope_pairs={config['rope_pairs']}: {CLASS} has {pairs} for heads of {head}")
    if config["cond"] % cells:
        raise ConfigError(f"config.model.cond={config['cond']}: {CLASS} wants channels · {cells}, whole latents")
    image = config["image_width"] or None
    return {
        "patch_size": list(config.patch),
        "num_attention_heads": config["heads"],
        "attention_head_dim": head,
        "in_channels": config.channels + config["cond"] // cells,
        "out_channels": config.channels,
        "text_dim": config.text_width,
        "freq_dim": SINUSOIDS,
        "ffn_dim": config["mlp_dim"],
        "num_layers": config["layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image,
        "added_kv_proj_dim": config["width"] if image else None,
        "rope_max_seq_len": DEFAULTS["rope_max_seq_len"],
        "pos_embed_seq_len": config["image_tokens"] or None,
    }


@functools.lru_cache(maxsize=8)
def entries(config: Architecture) -> tuple[Entry, ...]:
    """Every tensor of a transformer of this architecture under both names, each once."""
    found: list[Entry] = []
    halves = rope_halves(config["heads"], config["width"] // config["heads"])
    channels = config.channels + config["cond"] // math.prod(config.patch)
    for path, shape in sorted(packed.shapes(config).items()):
        stacked = path.startswith("blocks/")
        shape, layers = (shape[1:], range(shape[0])) if stacked else (shape, (None,))
        turned = re.match(r"blocks/attention/(query|key)(_norm)?/", path) is not None
        outputs = halves if turned else None
        for layer in layers:
            key, stored, inputs = *_there(path, shape), None
            if path == "embed/kernel":  # channels there are all in one patch; here the noisy ones and then the rest
                stored = (config["width"], channels, *config.patch)
                inputs = packed.noisy_first(config.channels, channels, math.prod(config.patch))
            found.append(Entry(path, shape, key.format(layer), stored, layer, inputs, outputs))
    assert len({entry.key for entry in found}) == len(found), "two parameters under one name"
    return tuple(found)


def _there(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """(key, shape) of a parameter there; the key has {} for the number of a block."""
    if path in TABLES:
        key, rows = TABLES[path]
        return key, (1, rows, shape[0] // rows) if rows else (1, *shape)
    layer, leaf = path.rsplit("/", 1)
    key = f"{LAYERS[layer]}.{'bias' if leaf == 'bias' else 'weight'}"
    return key, shape[::-1]


def rope_halves(heads: int, head: int) -> tuple[int, ...]:
    """The order of queries' and keys' features there that is ours: neighbours turn together there, and halves here."""
    return tuple(h * head + 2 * (i % (head // 2)) + i // (head // 2) for h in range(heads) for i in range(head))


class WanTransformer(packed.Transformer):
    """A `WanTransformer3DModel`."""

    DEFAULTS = DEFAULTS

    def __call__(
        self,
        hidden_states: np.ndarray,
        timestep: np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_hidden_states_image: np.ndarray | None = None,
    ) -> np.ndarray:
        """The prediction, [B,out_channels,T,H,W] f32.

        Args:
          hidden_states: [B,in_channels,T,H,W], T, H, W multiples of the patch.
          timestep: [B], or one for each token, [B, tokens]; 0 to 1000, not only whole numbers.
          encoder_hidden_states: [B,L,text_dim]; all L places are attended to.
          encoder_hidden_states_image: of a model with image_dim, [B,M,image_dim]; with pos_embed_seq_len
            [2B,M/2,image_dim], a clip's first and last image one after the other.

        Raises ValueError for other shapes, for integers where floats are expected, and for NaN or infinity.
        """
        rows = self.rows(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        patch = self.architecture.patch
        grid = tuple(n // p for n, p in zip(np.shape(hidden_states)[2:], patch, strict=True))
        out = np.asarray(packed.predict(self.module, self.params, *rows))
        return np.ascontiguousarray(np.moveaxis(unpatchify(out, grid, patch), -1, 1))

    def rows(
        self,
        hidden_states: np.ndarray,
        timestep: np.ndarray,
        encoder_hidden_states: np.ndarray,
        encoder_hidden_states_image: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, TokenBatch]:
        """(noisy tokens [B,S,P], noise levels [B,N], batch): what `module` is called with for these; see `__call__`."""
        c, patch = self.architecture, self.architecture.patch
        x = packed.checked(hidden_states, "hidden_states", (None, self.config["in_channels"], None, None, None))
        rows, grid = x.shape[0], tuple(n // p for n, p in zip(x.shape[2:], patch, strict=True))
        if any(n % p for n, p in zip(x.shape[2:], patch, strict=True)):
            raise ValueError(f"hidden_states of {list(x.shape[2:])}: expected multiples of the patch {list(patch)}")
        if max(grid) > self.config["rope_max_seq_len"]:
            most = self.config["rope_max_seq_len"]
            raise ValueError(f"{max(grid)} tokens along an axis: expected at most rope_max_seq_len={most}")
        tokens = patchify(np.moveaxis(x, 1, -1), patch).reshape(rows, math.prod(grid), math.prod(patch), -1)
        noisy, cond = (part.reshape(rows, math.prod(grid), -1) for part in np.split(tokens, [c.channels], axis=-1))
        text = packed.checked(encoder_hidden_states, "encoder_hidden_states", (rows, None, c.text_width))
        context = {"text": (text, np.ones(text.shape[:2], np.int32))}
        if c["image_width"]:
            image = self._image(encoder_hidden_states_image, rows)
            context["image"] = (image, np.ones(image.shape[:2], np.int32))
        elif encoder_hidden_states_image is not None:
            raise ValueError("encoder_hidden_states_image: image_dim is null, expected none")
        levels, level = packed.levels_of(timestep, rows, math.prod(grid))
        batch = TokenBatch(
            tokens=None,
            coords=np.broadcast_to(packed.grid_coords(grid), (rows, math.prod(grid), 3)),
            segment=np.ones((rows, math.prod(grid)), np.int32),
            level=level,
            cond=cond if c["cond"] else None,
            context=context,
        )
        return noisy, levels, batch

    def _image(self, image: np.ndarray | None, rows: int) -> np.ndarray:
        """Image features, [B,M,image_dim]."""
        c = self.architecture
        if image is None:
            raise ValueError(f"encoder_hidden_states_image: image_dim={c['image_width']}, expected features")
        if not c["image_tokens"]:
            return packed.checked(image, "encoder_hidden_states_image", (rows, None, c["image_width"]))
        half = (2 * rows, c["image_tokens"] // 2, c["image_width"])
        return packed.checked(image, "encoder_hidden_states_image", half).reshape(rows, c["image_tokens"], -1)
