"""The packed spacetime DiT."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models import remat, windows
from vidgen.models.attend import Attending
from vidgen.models.attention import check_heads, dtype_of
from vidgen.models.blocks import Block, Group, modulation, norm, pick
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.models.remat import rematerialised
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
      shared_modulation: see `Block.shared`.
      text: the encoder of byte ids, or None where the batch brings text as values.
      text_mlp: whether two matrices turn text into the model's width before the blocks attend to it.
      remat: see `vidgen/models/remat.py`.
      window: (t, y, x) in tokens of the windows that layers attend within, alternately moved by half; () = none.
      full_every: with windows, each so-many-th layer attends to the whole clip; 0 = none does.
      layout: where weights lie; None = one device.
      how: attention's kernel and strategy over the mesh.
    """

    features: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    rope_theta: float = 100.0
    absolute: bool = True
    shared_modulation: bool = False
    text: nn.Module | None = None
    text_mlp: bool = False
    remat: str = "full"
    unroll: int = 1
    dtype: Dtype = jnp.float32
    residual: Dtype = jnp.float32
    window: tuple[int, ...] = ()
    full_every: int = 4
    layout: Layout | None = None
    how: Attending = Attending()

    def setup(self):
        def linear(features, **more):
            return Linear(features, layout=self.layout, **more)

        small = {"precision": "highest", "over_context": False}
        self.embed = linear(self.width, dtype=self.dtype)
        if self.absolute:
            self.place = linear(self.width, precision="highest")
        self.level_in = linear(self.width, **small)
        self.level_out = linear(self.width, **small)
        if self.shared_modulation:
            self.modulation = modulation(6 * self.width, self.layout)
        if self.text_mlp:
            self.text_in = linear(self.width, dtype=self.dtype, over_context=False)
            self.text_out = linear(self.width, dtype=self.dtype, over_context=False)
        pattern = layer_pattern(self.window, self.full_every)
        layout = self.layout and dataclasses.replace(self.layout, rematerialised=self.remat != "none")
        arguments = (self.heads, self.mlp_ratio, self.dtype, self.residual, self.shared_modulation, layout, self.how)
        rounds = self.layers // len(pattern)
        unroll = min(rounds, max(1, self.unroll // len(pattern)))
        block = rematerialised(Block, self.remat, scanned=unroll < rounds)
        self.blocks = nn.scan(
            block if len(pattern) == 1 else Group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=rounds,
            unroll=unroll,
        )(*(arguments if len(pattern) == 1 else (block, arguments, pattern)))
        self.final_modulation = modulation(2 * self.width, self.layout)
        self.head = linear(self.features, precision="highest", kernel_init=nn.initializers.zeros)

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
        if text is not None and self.text_mlp:
            text = (self.text_out(nn.gelu(self.text_in(text[0]))), text[1])
        condition = self.level_out(nn.silu(self.level_in(sinusoids(1000.0 * levels_BxN, 256))))
        per_block = self.modulation(nn.silu(condition)) if self.shared_modulation else condition
        ids = {"segment": batch.segment}
        if self.window:
            for name, shift in (("window", False), ("shifted", True)):
                ids[name] = windows.window_ids(batch.segment, batch.coords, self.window, shift)
        table = rope_table(batch.coords, self.width // self.heads, self.rope_theta)
        x = self.embed(noisy_BxSxP).astype(jnp.float32)
        if self.absolute:
            x = x + self.place(sinusoids(batch.coords, 64, self.rope_theta).reshape(*x.shape[:2], -1))
        x, _ = self.blocks(x.astype(self.residual), per_block, batch.level, ids, table, text)
        shift, scale = (
            pick(part, batch.level) for part in jnp.split(self.final_modulation(nn.silu(condition)), 2, axis=-1)
        )
        return self.head(norm(x) * (1 + scale) + shift)


def layer_pattern(window: tuple[int, ...], full_every: int) -> tuple[str, ...]:
    """The ids that the layers of one repetition go by, as `Block.ids` names them."""
    if not window or full_every == 1:
        return ("segment",)
    if not full_every:
        return ("window", "shifted")
    return (*(("window", "shifted")[i % 2] for i in range(full_every - 1)), "segment")


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the model that mean nothing."""
    m = config.model
    check_heads("model", m)
    remat.parse(m.remat)
    window = windows.from_config(config) or ()
    repeat = len(layer_pattern(window, m.full_every))
    if m.layers % repeat:
        near = max(1, round(m.layers / repeat)) * repeat
        raise ConfigError(
            f"config.model.layers={m.layers}: windows with config.model.full_every={m.full_every} repeat every "
            f"{repeat} layers; nearest: {near}"
        )


def from_config(
    config: ConfigDict,
    features: int,
    text: nn.Module | None,
    layout: Layout | None = None,
    how: Attending = Attending(),  # noqa: B008 - frozen
) -> DiT:
    """The denoiser of a config, for tokens of `features` numbers; raises ConfigError."""
    m = config.model
    check(config)
    return DiT(
        features=features,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        rope_theta=m.rope_theta,
        absolute=m.absolute,
        shared_modulation=m.shared_modulation,
        text=text,
        text_mlp=m.text_mlp,
        remat=m.remat,
        unroll=min(m.unroll, m.layers),
        dtype=dtype_of("dtype", config.dtype),
        residual=dtype_of("model.residual", m.residual),
        window=tuple(m.window),
        full_every=m.full_every,
        layout=layout,
        how=how,
    )
