"""`T5EncoderModel` and `UMT5EncoderModel` of transformers: settings, names of tensors, and a call like theirs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidgen.config import ConfigError
from vidgen.interop.names import Entry
from vidgen.text import frozen
from vidgen.text.t5 import T5Config, T5Encoder

KINDS = frozen.KINDS
CLASSES = {"T5EncoderModel": "t5", "UMT5EncoderModel": "umt5"}
# The table of embeddings goes by both names, and a file has either or both.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
# transformers' name → ours, what it takes where config.json is silent: T5's, and UMT5's.
SIZES = {
    "vocab_size": ("vocab", 32128, 250112),
    "d_model": ("width", 512, 512),
    "d_kv": ("head_dim", 64, 64),
    "d_ff": ("mlp_dim", 2048, 1024),
    "num_layers": ("layers", 6, 8),
    "num_heads": ("heads", 8, 6),
    "relative_attention_num_buckets": ("buckets", 32, 32),
    "relative_attention_max_distance": ("distance", 128, 128),
}
MLPS = {"relu": False, "gated-gelu": True}
SUB = "layer.0.SelfAttention."
LEAVES = {
    "norm1/scale": "layer.0.layer_norm.weight",
    "query/kernel": SUB + "q.weight",
    "key/kernel": SUB + "k.weight",
    "value/kernel": SUB + "v.weight",
    "out/kernel": SUB + "o.weight",
    "bias/table": SUB + "relative_attention_bias.weight",
    "norm2/scale": "layer.1.layer_norm.weight",
}


@dataclasses.dataclass(frozen=True, eq=False)
class T5:
    """A `T5EncoderModel` or `UMT5EncoderModel`, to be called as transformers' are, with NumPy arrays, in float32.

    Attributes:
      module: the Flax module.
      params: its parameters, float32.
      config: transformers' settings, with its defaults where config.json is silent.
    """

    module: T5Encoder
    params: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def build(cls, config: T5Config, params: Mapping[str, Any], settings: Mapping[str, Any]) -> T5:
        """From the sizes, NumPy parameters and the settings in transformers' terms."""
        return cls(T5Encoder(config), jax.tree.map(jnp.asarray, dict(params)), write_config(config) | dict(settings))

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """The last hidden state.

        Args:
          input_ids: [B,L] integers in [0, vocab).
          attention_mask: [B,L], 0 where there is padding; None: nowhere.

        Returns:
          [B,L,E] f32, of padding as well.

        Raises ValueError for other shapes, for floats as ids, and for an id that the vocabulary has not.
        """
        ids, vocab = np.asarray(input_ids), self.module.config.vocab
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"input_ids of {ids.dtype} {list(ids.shape)}: expected integers [B,L]")
        if ids.min() < 0 or ids.max() >= vocab:
            odd = ids[(ids < 0) | (ids >= vocab)][0]
            raise ValueError(f"input_ids has {odd}: expected 0 to {vocab - 1}, the encoder's vocabulary")
        mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask of {list(mask.shape)}: expected {list(ids.shape)}, as input_ids")
        return np.asarray(_applied(self.module)(self.params, ids.astype(np.int32), mask.astype(np.int32)))


@functools.lru_cache(maxsize=8)
def _applied(module: T5Encoder):
    return jax.jit(lambda params, ids, mask: module.apply({"params": params}, ids, mask))


def read_config(config: Mapping[str, Any], file: str) -> T5Config:
    """The sizes that transformers' settings ask for; those that only concern a decoder or training are not looked at.

    Raises ConfigError for another model_type, a setting of a wrong type, and an MLP that isn't implemented; `file` is
    where the settings stand.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ConfigError(f"{file}: model_type={kind!r}: expected {' or '.join(KINDS)}")
    if config.get("is_decoder"):
        raise ConfigError(f"{file}: is_decoder=true: expected an encoder")
    mlp = config.get("feed_forward_proj", "gated-gelu" if kind == "umt5" else "relu")
    if mlp not in MLPS:
        raise ConfigError(f"{file}: feed_forward_proj={mlp!r} is not implemented; expected {' or '.join(MLPS)}")
    sizes = {}
    for key, (name, *defaults) in SIZES.items():
        sizes[name] = config.get(key, defaults[KINDS.index(kind)])
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise ConfigError(f"{file}: {key}={sizes[name]!r}: expected a whole number ≥ 1")
    eps = config.get("layer_norm_epsilon", 1e-6)
    if type(eps) not in (int, float) or not eps >= 0:
        raise ConfigError(f"{file}: layer_norm_epsilon={eps!r}: expected a number ≥ 0")
    try:
        return T5Config(**sizes, gated=MLPS[mlp], bias_per_layer=kind == "umt5", eps=float(eps))
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from None


def write_config(config: T5Config) -> dict[str, Any]:
    """Inverse of `read_config`: the settings that transformers reads an encoder by, its class among them."""
    name = next(name for name, kind in CLASSES.items() if kind == config.kind)
    return {
        "architectures": [name],
        "model_type": config.kind,
        **{key: getattr(config, own) for key, (own, *_) in SIZES.items()},
        "feed_forward_proj": next(mlp for mlp, gated in MLPS.items() if gated == config.gated),
        "layer_norm_epsilon": config.eps,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def entries(config: T5Config, keys: Collection[str] = ()) -> tuple[Entry, ...]:
    """Every parameter of an encoder of these sizes under both names.

    `keys`: of the file that is read, or written: they say by which of its two names the table of embeddings is there.
    Under both, the two are to be equal (see `arrays.of_checkpoint`).
    """
    tables = tuple(key for key in EMBEDDINGS if key in keys) or EMBEDDINGS[:1]
    return _entries(config, tables)


@functools.lru_cache(maxsize=8)
def _entries(config: T5Config, tables: tuple[str, ...]) -> tuple[Entry, ...]:
    dense = "layer.1.DenseReluDense."
    mlp = {"gate/kernel": "wi_0", "up/kernel": "wi_1" if config.gated else "wi", "down/kernel": "wo"}
    leaves = LEAVES | {leaf: f"{dense}{name}.weight" for leaf, name in mlp.items()}
    found = []
    for path, like in sorted(frozen.shapes(config).items()):
        shape = like.shape
        if path == "embedding":
            found += [Entry(path, shape, key, shape) for key in tables]
        elif path == "norm/scale":
            found.append(Entry(path, shape, "encoder.final_layer_norm.weight", shape))
        elif path == "bias/table":
            found.append(Entry(path, shape, f"encoder.block.0.{leaves[path]}", shape))
        else:
            shape, leaf = shape[1:], leaves[path.removeprefix("layers/")]
            stored = shape[::-1] if path.endswith("kernel") else shape
            found += [
                Entry(path, shape, f"encoder.block.{layer}.{leaf}", stored, layer) for layer in range(config.layers)
            ]
    return tuple(found)
