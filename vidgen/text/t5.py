"""The encoders of T5 and UMT5, as one module.

T5 is by Raffel et al. (arXiv:1910.10683), its version 1.1 with gated GELUs by Shazeer (arXiv:2002.05202), UMT5 by Chung
et al. (arXiv:2304.09151).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vidgen.config import ConfigError
from vidgen.models.linear import Dtype


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder.

    vocab: rows of the table of embeddings.
    width: E, of what it puts out.
    head_dim: of a head; heads · head_dim need not be the width.
    mlp_dim: hidden width of the MLP.
    gated: the MLP's hidden values are GELU (tanh) of one product times another (v1.1, UMT5); else ReLU of one (v1.0).
    bias_per_layer: each layer has a table of relative biases (UMT5); else the first has one for all (T5).
    buckets: of distances between two tokens, half of them for each direction.
    distance: from which on all are in the last bucket.
    eps: of the norms.
    """

    vocab: int
    width: int
    head_dim: int
    mlp_dim: int
    layers: int
    heads: int
    gated: bool = True
    bias_per_layer: bool = False
    buckets: int = 32
    distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        least = {"buckets": 4, "distance": self.buckets // 4 + 1 if type(self.buckets) is int else 2}
        for key in ("vocab", "width", "head_dim", "mlp_dim", "layers", "heads", "buckets", "distance"):
            value = getattr(self, key)
            if type(value) is not int or value < least.get(key, 1):
                raise ConfigError(f"{key}={value!r}: expected a whole number ≥ {least.get(key, 1)}")
        if self.buckets % 2:
            raise ConfigError(f"buckets={self.buckets}: expected an even number, half of them for each direction")

    @property
    def kind(self) -> str:
        """Of its weights directories."""
        return "umt5" if self.bias_per_layer else "t5"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """Inverse of `to_dict`; raises ConfigError for keys that are missing or unknown."""
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        odd = [key for key in values if key not in fields]
        lacking = [key for key, needed in fields.items() if needed and key not in values]
        if odd or lacking:
            what = f"unknown setting {odd[0]}" if odd else f"no setting {lacking[0]}"
            raise ConfigError(f"{what} of a T5 encoder; expected {', '.join(fields)}")
        return cls(**values)


def relative_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
    """[length, length] i32: the bucket of key j's distance from query i (section 2.1 of the T5 paper).

    Behind the query in [0, buckets/2), ahead of it above; half of each for distances one by one, the others in steps
    that grow with the logarithm, up to `distance`.
    """
    places = np.arange(length)
    ahead = places[None, :] - places[:, None]
    half = buckets // 2
    exact, away = half // 2, np.abs(ahead)
    # float32, as the weights were trained with: at powers of two the last bit decides the bucket.
    grown = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(distance / exact))
    coarse = np.minimum(exact + (grown * np.float32(half - exact)).astype(np.int64), half - 1)
    return (np.where(away < exact, away, coarse) + half * (ahead > 0)).astype(np.int32)


class RMSNorm(nn.Module):
    """Root mean square norm with a scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale.astype(jnp.float32)


class RelativeBias(nn.Module):
    """What distance adds to the scores of each head."""

    heads: int
    buckets: int

    @nn.compact
    def __call__(self, buckets_LxL: np.ndarray) -> jax.Array:
        """[heads, L, L] f32."""
        table = self.param("table", nn.initializers.normal(0.1), (self.buckets, self.heads))
        return jnp.moveaxis(table.astype(jnp.float32)[buckets_LxL], -1, 0)


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and added to what came in."""

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxE: jax.Array, mask_BxL: jax.Array, buckets_LxL: jax.Array, bias_HxLxL: jax.Array | None):
        c, x = self.config, x_BxLxE

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def heads(name: str) -> jax.Array:
            return linear(c.heads * c.head_dim, name)(h).reshape(*h.shape[:2], c.heads, c.head_dim)

        h = RMSNorm(c.eps, name="norm1")(x)
        # No 1/√d: the initialisation of the queries has it (as the paper's own code does).
        scores = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key"), preferred_element_type=jnp.float32)
        scores += RelativeBias(c.heads, c.buckets, name="bias")(buckets_LxL) if c.bias_per_layer else bias_HxLxL
        scores = jnp.where(mask_BxL[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, heads("value")).reshape(*h.shape[:2], -1)
        x = x + linear(c.width, "out")(seen)
        h = RMSNorm(c.eps, name="norm2")(x)
        if c.gated:
            hidden = nn.gelu(linear(c.mlp_dim, "gate")(h), approximate=True) * linear(c.mlp_dim, "up")(h)
        else:
            hidden = nn.relu(linear(c.mlp_dim, "up")(h))
        return x + linear(c.width, "down")(hidden), None


class T5Encoder(nn.Module):
    """Ids → vectors. Layers are stacked under `layers/`, first axis = layer, and scanned over."""

    config: T5Config
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        """Values [B,L,E] f32 of ids in [0, vocab); where `mask` is 0 there is padding, which nobody attends to."""
        chex.assert_rank([ids_BxL, mask_BxL], 2)
        c, length = self.config, ids_BxL.shape[1]
        table = self.param("embedding", nn.initializers.normal(1.0), (c.vocab, c.width))
        x = table[ids_BxL].astype(jnp.float32)
        buckets = relative_buckets(length, c.buckets, c.distance)
        bias = None if c.bias_per_layer else RelativeBias(c.heads, c.buckets, name="bias")(buckets)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        x, _ = layers(c, self.dtype, name="layers")(x, mask_BxL > 0, jnp.asarray(buckets), bias)
        return RMSNorm(c.eps, name="norm")(x)
