"""U-ViT on packed rows: noise levels, text and patches are tokens of one sequence (Bao et al., arXiv:2209.12152)."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models import dit
from vidgen.models.architecture import KEYS, mlp_dim
from vidgen.models.attend import Attending
from vidgen.models.attention import Attention, dtype_of
from vidgen.models.conditions import class_table, complete, encoded, labels_of, rank_in_segment
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.models.places import placed, sinusoids
from vidgen.models.remat import rematerialised
from vidgen.models.rope import rope_table
from vidgen.parallel.mesh import TOKENS

LANES = 128  # tokens that splash wants a multiple of on each device
# Keys of `config.model` that mean nothing here; set to anything but their default, they are refused.
UNUSED = (
    "cross_norm",
    "final",
    "image_tokens",
    "image_width",
    "learned_sigma",
    "level_per_block",
    "mlp_eps",
    "shared_modulation",
    "text_mlp",
    "window",
)


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """With weights and biases, in float32."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all blocks of a U-ViT have in common; the attributes of `UViT` of the same names."""

    heads: int
    mlp_dim: int
    bias: bool
    qk_norm: str
    dtype: Dtype
    residual: Dtype
    layout: Layout | None
    how: Attending


class Block(nn.Module):
    """A transformer block with affine layer norms before attention and MLP, at the end of a long skip or not.

    Attributes:
      emits: whether its output begins a long skip, which `nn.scan` stacks.
    """

    shape: Shape
    emits: bool = False

    @nn.compact
    def __call__(self, x_BxSxW, skip_BxSxW, ids_BxS, table) -> tuple[jax.Array, jax.Array | None]:
        """(x, x where it begins a skip).

        Args:
          skip_BxSxW: the output of the block that this one mirrors, or None.
          ids_BxS: i32, 0 = padding; tokens attend to those of equal id.
          table: from `rope_table`, or None.
        """
        s = self.shape

        def linear(features, name):
            return Linear(features, dtype=s.dtype, layout=s.layout, name=name)

        def add(x, y):
            return x + y.astype(jnp.float32)

        if s.layout is not None:
            x_BxSxW = jax.lax.with_sharding_constraint(x_BxSxW, NamedSharding(s.layout.mesh, TOKENS))
        x = checkpoint_name(x_BxSxW, "residual")
        width = x.shape[-1]
        if skip_BxSxW is not None:
            x = linear(width, "skip")(jnp.concatenate([x, skip_BxSxW], axis=-1))
        x = x.astype(jnp.float32)
        h = checkpoint_name(layer_norm("attention_norm")(x).astype(s.dtype), "attention_norm")
        attention = Attention(s.heads, s.dtype, s.layout, s.how, bias=s.bias, qk_norm=s.qk_norm, name="attention")
        x = add(x, attention(h, ids_BxS, table))
        if not s.bias:  # published: of the output alone
            x = x + self.param("attention_bias", nn.initializers.zeros, (width,), jnp.float32)
        h = layer_norm("mlp_norm")(x).astype(s.dtype)
        h = checkpoint_name(linear(s.mlp_dim, "up")(h), "mlp_up")
        h = checkpoint_name(linear(width, "down")(nn.gelu(h, approximate=False)), "mlp_down")
        x = add(x, h).astype(s.residual)
        return x, x if self.emits else None


class Blocks(nn.Module):
    """n blocks, one more, and n that mirror the first: the last gets the output of the first beside its input.

    Weights are stacked under `in`, `middle` and `out`, first axis = layer.
    """

    shape: Shape
    layers: int
    remat: str
    unroll: int

    @nn.compact
    def __call__(self, x_BxSxW, ids_BxS, table) -> jax.Array:
        """[B,S,W] → [B,S,W], in the residual's dtype."""
        half = self.layers // 2

        def run(x, skips, length, name, emits=False):
            unroll = min(length, self.unroll)
            scanned = nn.scan(
                rematerialised(Block, self.remat, scanned=unroll < length),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast if skips is None else 0, nn.broadcast, nn.broadcast),
                length=length,
                unroll=unroll,
            )
            return scanned(self.shape, emits, name=name)(x, skips, ids_BxS, table)

        x, skips = run(x_BxSxW, None, half, "in", emits=True)
        x, _ = run(x, None, 1, "middle")
        return run(x, jnp.flip(skips, axis=0), half, "out")[0]


class UViT(nn.Module):
    """Diffusion transformer without modulation, over packed rows: segments never see each other.

    A row is one sequence of text tokens, a token for each of its noise levels, one for each label where there are
    labels, and patches; a segment attends to its own of each. Level k is segment k's, as in plain training and in
    sampling: all tokens of a clip see that one, and those that are given (level 0) are marked by a learned vector.

    Attributes:
      features: P of the noisy tokens; as many come out.
      layers: odd: n blocks, one more, and n that end long skips.
      bias: of queries, keys and values, and not of attention's output alone.
      absolute, table: how patches are told where they are, as `config.model` has them.
      places: with absolute="table", text tokens of a caption that have a learned place.
      rope: whether patches turn queries and keys by where they are.
      classes: labels of `batch.vectors[..., 0]`; `classes` itself is none.
      cond: C of `batch.cond`, which goes into the first layer beside the noisy tokens; 0 = none.
      cross: whether text is part of the sequence.
      text: the encoder of byte ids, or None where the batch brings text as values.
      remat: see `vidgen/models/remat.py`.
      layout: where weights lie; None = one device.
      how: attention's kernel and strategy over the mesh.
    """

    features: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    bias: bool = False
    qk_norm: str = "none"
    rope: bool = False
    rope_pairs: tuple[int, ...] = ()
    rope_theta: float = 100.0
    level_theta: float = 10_000.0
    absolute: str = "projected"
    table: tuple[int, ...] = ()
    places: int = 0
    classes: int = 0
    cond: int = 0
    cross: bool = True
    text: nn.Module | None = None
    remat: str = "full"
    unroll: int = 1
    dtype: Dtype = jnp.float32
    residual: Dtype = jnp.float32
    layout: Layout | None = None
    how: Attending = Attending()

    def setup(self):
        def linear(features, **more):
            return Linear(features, layout=self.layout, **more)

        def vectors(name, *shape, init=nn.initializers.normal(0.02)):  # noqa: B008 - a function
            return self.param(name, init, (*shape, self.width), jnp.float32)

        self.embed = linear(self.width, dtype=self.dtype)
        if self.absolute == "projected":
            self.place = linear(self.width, precision="highest")
        elif self.absolute == "table":
            self.place_table = vectors("place_table", math.prod(self.table))
        self.level_place = vectors("level_place")
        self.given = vectors("given", init=nn.initializers.zeros)
        if self.classes:
            self.class_table = class_table(self, self.classes, self.width)
        if self.cross:
            self.text_in = linear(self.width, dtype=self.dtype, over_context=False)
            if self.absolute == "table":
                self.text_places = vectors("text_places", self.places)
        layout = self.layout and dataclasses.replace(self.layout, rematerialised=self.remat != "none")
        shape = (self.heads, self.mlp_dim, self.bias, self.qk_norm, self.dtype, self.residual, layout, self.how)
        self.blocks = Blocks(Shape(*shape), self.layers, self.remat, self.unroll)
        self.final_norm = layer_norm()
        self.head = linear(self.features, precision="highest", kernel_init=nn.initializers.zeros)

    def encode_context(self, batch: TokenBatch) -> TokenBatch:
        """`batch` with its text ids turned into values, so that a sampler encodes a prompt once."""
        return encoded(batch, self.text) if self.cross else batch

    def __call__(self, noisy_BxSxP: jax.Array, levels_BxN: jax.Array, batch: TokenBatch) -> jax.Array:
        """Prediction [B,S,P] f32 for noisy tokens at the row's noise levels in [0, 1] (0 = clean).

        Raises ConfigError if the batch lacks what the model was made for, or brings what it has no input for.
        """
        chex.assert_rank([noisy_BxSxP, levels_BxN, batch.segment, batch.coords], [3, 2, 2, 3])
        making = self.is_initializing()
        batch = complete(batch, levels_BxN.shape[1], making, cond=self.cond, classes=self.classes)
        patches = self._patches(noisy_BxSxP, batch)
        others, ids = self._others(levels_BxN, batch)
        pieces = self.how.mesh.shape["context"] if self.how.mesh else 1
        pad = filled(others.shape[1], self.how) - others.shape[1]
        others, ids = jnp.pad(others, ((0, 0), (0, pad), (0, 0))), jnp.pad(ids, ((0, 0), (0, pad)))
        coords = jnp.zeros((*ids.shape, 3))
        x = join(others, patches, pieces).astype(self.residual)
        table = None
        if self.rope:
            head = self.width // self.heads
            table = rope_table(join(coords, batch.coords, pieces), head, self.rope_theta, self.rope_pairs)
        x = self.blocks(x, join(ids, batch.segment, pieces), table)
        return self.head(self.final_norm(patches_of(x, ids.shape[1], pieces)))

    def _patches(self, noisy_BxSxP: jax.Array, batch: TokenBatch) -> jax.Array:
        """[B,S,W] f32."""
        inputs = noisy_BxSxP if batch.cond is None else jnp.concatenate([noisy_BxSxP, batch.cond], axis=-1)
        x = placed(self, self.embed(inputs).astype(jnp.float32), batch.coords)
        given = (batch.level == 0) & (batch.segment > 0)
        return x + given[..., None] * self.given

    def _others(self, levels_BxN: jax.Array, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Tokens that are no patches: ([B,M,W] f32, whose they are [B,M] i32)."""
        # Level 0 is nobody's, as segment 0 is.
        whose = jnp.broadcast_to(jnp.arange(levels_BxN.shape[1], dtype=jnp.int32), levels_BxN.shape)
        tokens = [sinusoids(1000.0 * levels_BxN, self.width, self.level_theta) + self.level_place]
        ids = [whose]
        if self.classes:
            tokens.append(labels_of(batch.vectors, self.class_table))
            ids.append(whose)
        if self.cross and "text" in batch.context:
            text, segment = self.encode_context(batch).context["text"]
            text = self.text_in(text).astype(jnp.float32)
            if self.absolute == "table":
                text = text + jnp.take(self.text_places, rank_in_segment(segment), axis=0, mode="clip")
            tokens, ids = [text, *tokens], [segment, *ids]
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(ids, axis=1)


def join(first: jax.Array, second: jax.Array, pieces: int) -> jax.Array:
    """Two sequences [B,M,…] and [B,S,…] as one, [B,M+S,…], of which each device of the context axis has a part of both.

    The first's part stands before the second's on each of the `pieces` devices, so that no token changes its place.
    """
    cut = [x.reshape(x.shape[0], pieces, -1, *x.shape[2:]) for x in (first, second)]
    whole = jnp.concatenate(cut, axis=2)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])


def patches_of(x_BxMSxW: jax.Array, others: int, pieces: int) -> jax.Array:
    """The second of the two that `join` made one; `others`: M of the first."""
    batch, length, width = x_BxMSxW.shape
    cut = x_BxMSxW.reshape(batch, pieces, length // pieces, width)[:, :, others // pieces :]
    return cut.reshape(batch, length - others, width)


def prefix(config: ConfigDict) -> int:
    """M, tokens of a row beside its patches, before they are filled up for a kernel or a context axis."""
    m, r = config.model, config.rows
    return (r.text if m.cross else 0) + (r.segments + 1) * (2 if m.classes else 1)


def places(config: ConfigDict) -> int:
    """Text tokens of a caption at most, which have learned places where patches do."""
    return max(config.rows.caption, config.text.pad)


def filled(tokens: int, how: Attending) -> int:
    """`tokens` beside the patches, and as much padding that they divide over the context axis as the kernel wants."""
    pieces = how.mesh.shape["context"] if how.mesh else 1
    unit = pieces * (LANES if how.kernel == "splash" else 1)
    return -(-tokens // unit) * unit


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the model that mean nothing."""
    m, usual = config.model, configs.base().model
    for key in UNUSED:
        if m[key] != usual[key]:
            raise ConfigError(
                f"config.model.{key}={m[key]!r}: means nothing to config.model.backbone=uvit; expected {usual[key]!r}"
            )
    if m.layers < 3 or m.layers % 2 == 0:
        near = max(3, m.layers // 2 * 2 + 1)
        raise ConfigError(
            f"config.model.layers={m.layers}: a U-ViT has n blocks, one, and n that end their skips; nearest: {near}"
        )
    dit.check(config)


def from_config(
    config: ConfigDict,
    features: int,
    text: nn.Module | None,
    layout: Layout | None = None,
    how: Attending = Attending(),  # noqa: B008 - frozen
) -> UViT:
    """The denoiser of a config, for tokens of `features` numbers; raises ConfigError."""
    m = config.model
    check(config)
    own = {field.name for field in dataclasses.fields(UViT)} & set(KEYS)
    return UViT(
        **{key: tuple(m[key]) if isinstance(m[key], list | tuple) else m[key] for key in own} | {"mlp_dim": mlp_dim(m)},
        features=features,
        places=places(config),
        text=text if m.cross else None,
        remat=m.remat,
        unroll=m.unroll,
        dtype=dtype_of("dtype", config.dtype),
        residual=dtype_of("model.residual", m.residual),
        layout=layout,
        how=how,
    )
