"""The packed spacetime DiT."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models.attention import Dtype, check_heads, dtype_of
from vidgen.models.blocks import Block, norm, pick
from vidgen.models.rope import rope_table


def sinusoids(x: jax.Array, width: int, longest: float = 10_000.0) -> jax.Array:
    """Cosines and sines of numbers, [...] → [..., width] f32, at wavelengths from 2π to 2π · `longest`."""
    frequency = jnp.exp(-jnp.log(longest) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = x[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class DiT(nn.Module):
    """Diffusion transformer over packed rows: segments never see each other, and noise levels belong to tokens.

    Attributes:
      features: P of the noisy tokens; as many come out.
      absolute: whether tokens are told where they are, beside the rotary embedding, which tells how far apart they are.
      text: the encoder of byte ids, or None where the batch brings text as values.
    """

    features: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    rope_theta: float = 100.0
    absolute: bool = True
    text: nn.Module | None = None
    remat: str = "full"
    unroll: int = 1
    dtype: Dtype = jnp.float32

    def setup(self):
        self.embed = nn.Dense(self.width, dtype=self.dtype)
        if self.absolute:
            self.place = nn.Dense(self.width, dtype=jnp.float32, precision="highest")
        self.level_in = nn.Dense(self.width, dtype=jnp.float32, precision="highest")
        self.level_out = nn.Dense(self.width, dtype=jnp.float32, precision="highest")
        block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            unroll=self.unroll,
        )(self.heads, self.mlp_ratio, self.dtype)
        zeros = nn.initializers.zeros
        self.final_modulation = nn.Dense(2 * self.width, dtype=jnp.float32, precision="highest", kernel_init=zeros)
        self.head = nn.Dense(self.features, dtype=jnp.float32, precision="highest", kernel_init=zeros)

    def encode_context(self, batch: TokenBatch) -> TokenBatch:
        """`batch` with its text ids turned into values, so that a sampler encodes a prompt once."""
        text, segment = batch.context["text"]
        if jnp.issubdtype(text.dtype, jnp.integer):
            text = self.text(text, segment)
        return batch.replace(context=batch.context | {"text": (text, segment)})

    def __call__(self, noisy_BxSxP: jax.Array, levels_BxN: jax.Array, batch: TokenBatch) -> jax.Array:
        """Prediction [B,S,P] f32 for noisy tokens at the row's noise levels in [0, 1] (0 = clean)."""
        chex.assert_rank([noisy_BxSxP, levels_BxN, batch.segment, batch.coords], [3, 2, 2, 3])
        if batch.cond is not None or batch.vectors is not None:
            raise NotImplementedError("this model has no inputs for batch.cond and batch.vectors")
        text = self.encode_context(batch).context["text"] if "text" in batch.context else None
        condition = self.level_out(nn.silu(self.level_in(sinusoids(1000.0 * levels_BxN, 256))))
        table = rope_table(batch.coords, self.width // self.heads, self.rope_theta)
        x = self.embed(noisy_BxSxP).astype(jnp.float32)
        if self.absolute:
            x = x + self.place(sinusoids(batch.coords, 64, self.rope_theta).reshape(*x.shape[:2], -1))
        x, _ = self.blocks(x, condition, batch.level, batch.segment, table, text)
        shift, scale = jnp.split(pick(self.final_modulation(nn.silu(condition)), batch.level), 2, axis=-1)
        return self.head(norm(x) * (1 + scale) + shift)


def from_config(config: ConfigDict, features: int, text: nn.Module | None) -> DiT:
    """The denoiser of a config, for tokens of `features` numbers; raises ConfigError."""
    m = config.model
    check_heads("model", m.width, m.heads)
    if m.remat not in ("none", "full"):
        raise ConfigError(f"config.model.remat={m.remat!r}: known are none, full")
    return DiT(
        features=features,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        rope_theta=m.rope_theta,
        absolute=m.absolute,
        text=text,
        remat=m.remat,
        unroll=min(m.unroll, m.layers),
        dtype=dtype_of(config),
    )
