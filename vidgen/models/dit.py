"""The packed spacetime DiT: one core, of which the published architectures are settings.

`config.model` at its defaults is ours. What DiT (Peebles & Xie, arXiv:2212.09748) and Wan (arXiv:2503.20314) set, key
by key, stands in `vidgen/interop/dit_transformer.py` and `vidgen/interop/wan_transformer.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models import places, remat, windows
from vidgen.models.architecture import KEYS, mlp_dim
from vidgen.models.attend import Attending
from vidgen.models.attention import QK_NORMS, check_heads, dtype_of
from vidgen.models.blocks import Block, Group, modulation, norm, pick
from vidgen.models.conditions import SINUSOIDS, EmbedImage, LevelsOfBlock, class_table, complete, encoded, labels_of
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.models.places import placed, sinusoids
from vidgen.models.remat import rematerialised
from vidgen.models.rope import axis_widths, rope_table

FINALS = ("modulation", "table")


class DiT(nn.Module):
    """Diffusion transformer over packed rows: segments never see each other, and noise levels belong to tokens.

    Attributes:
      features: P of the noisy tokens; as many come out.
      mlp_dim, mlp_eps, bias, qk_norm, cross_norm: see `Block`.
      rope: whether queries and keys are turned by where their tokens are.
      rope_pairs: turned pairs of a head along (t, y, x); () = a third each.
      level_theta: the longest wavelength of the sinusoids that noise levels x 1000 are told in, over 2π.
      absolute: how tokens are told where they are, beside the rotary embedding, which tells how far apart they are:
        "projected" (a layer on sinusoids), "sincos" (fixed, see `places.sincos`), "table" (learned) or "none".
      table: (t, y, x) tokens of the largest clip, of a learned table; with "sincos" says whether there is a time axis.
      cross: whether blocks attend to text.
      final: shift and scale before the head are a layer's ("modulation") or a table plus the level's vector ("table").
      classes: labels of clips, `batch.vectors[..., 0]`, whose embeddings are added to the noise level's; 0 = none.
      level_per_block: whether each block embeds levels and labels on its own; the first one's serves the end, too.
      learned_sigma: whether the head puts out P numbers more, of the variance.
      cond: C of `batch.cond`, which goes into the first layer beside the noisy tokens; 0 = none.
      image_width: of the features in `batch.context["image"]`; 0 = none.
      image_tokens: how many of them a clip has, if they get learned positions; 0 = they get none.
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
    mlp_dim: int
    mlp_eps: float = 1e-6
    bias: bool = False
    qk_norm: str = "head"
    rope: bool = True
    rope_pairs: tuple[int, ...] = ()
    rope_theta: float = 100.0
    level_theta: float = 10_000.0
    absolute: str = "projected"
    table: tuple[int, ...] = ()
    cross: bool = True
    cross_norm: bool = False
    final: str = "modulation"
    classes: int = 0
    level_per_block: bool = False
    learned_sigma: bool = False
    cond: int = 0
    image_width: int = 0
    image_tokens: int = 0
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
        if self.absolute == "projected":
            self.place = linear(self.width, precision="highest")
        elif self.absolute == "table":
            shape = (math.prod(self.table), self.width)
            self.place_table = self.param("place_table", nn.initializers.normal(0.02), shape, jnp.float32)
        if self.level_per_block:
            levels = nn.scan(
                LevelsOfBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )
            self.levels = levels(self.width, self.classes, self.level_theta, self.layout)
        else:
            self.level_in = linear(self.width, **small)
            self.level_out = linear(self.width, **small)
            if self.classes:
                self.class_table = class_table(self, self.classes, self.width)
        if self.shared_modulation:
            self.modulation = modulation(6 * self.width, self.layout)
        if self.text_mlp:
            self.text_in = linear(self.width, dtype=self.dtype, over_context=False)
            self.text_out = linear(self.width, dtype=self.dtype, over_context=False)
        if self.image_width:
            self.image = EmbedImage(self.width, self.image_tokens, self.dtype, self.layout)
        self.blocks = self._blocks()
        if self.final == "table":
            self.final_table = self.param("final_table", nn.initializers.zeros, (2 * self.width,), jnp.float32)
        else:
            self.final_modulation = modulation(2 * self.width, self.layout)
        out = self.features * (2 if self.learned_sigma else 1)
        self.head = linear(out, precision="highest", kernel_init=nn.initializers.zeros)

    def _blocks(self) -> nn.Module:
        """All blocks, as a scan over their stacked weights."""
        pattern = layer_pattern(self.window, self.full_every)
        rounds = self.layers // len(pattern)
        unroll = min(rounds, max(1, self.unroll // len(pattern)))
        block = rematerialised(Block, self.remat, scanned=unroll < rounds)
        arguments = {
            "heads": self.heads,
            "mlp_dim": self.mlp_dim,
            "dtype": self.dtype,
            "residual": self.residual,
            "shared": self.shared_modulation,
            "bias": self.bias,
            "qk_norm": self.qk_norm,
            "cross_norm": self.cross_norm,
            "mlp_eps": self.mlp_eps,
            "layout": self.layout and dataclasses.replace(self.layout, rematerialised=self.remat != "none"),
            "how": self.how,
        }
        scanned = nn.scan(
            block if len(pattern) == 1 else Group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            # The noise levels' vectors, then what is the same for all.
            in_axes=(0 if self.level_per_block else nn.broadcast, *(nn.broadcast,) * 5),
            length=rounds,
            unroll=unroll,
        )
        if len(pattern) == 1:
            return scanned(**arguments)
        return scanned(block, arguments, pattern, self.level_per_block)

    def encode_context(self, batch: TokenBatch) -> TokenBatch:
        """`batch` with its text ids turned into values, so that a sampler encodes a prompt once."""
        return encoded(batch, self.text) if self.cross else batch

    def __call__(
        self, noisy_BxSxP: jax.Array, levels_BxN: jax.Array, batch: TokenBatch, with_sigma: bool = False
    ) -> jax.Array:
        """Prediction [B,S,P] f32 for noisy tokens at the row's noise levels in [0, 1] (0 = clean).

        `with_sigma`: of a model with learned sigma, [B,S,2P], the variance behind the prediction. Raises ConfigError
        if the batch lacks what the model was made for, or brings what it has no input for.
        """
        chex.assert_rank([noisy_BxSxP, levels_BxN, batch.segment, batch.coords], [3, 2, 2, 3])
        batch = complete(
            batch,
            levels_BxN.shape[1],
            self.is_initializing(),
            cond=self.cond,
            classes=self.classes,
            image_width=self.image_width,
            image_tokens=self.image_tokens,
        )
        text = self.encode_context(batch).context.get("text") if self.cross else None
        if text is not None and self.text_mlp:
            text = (self.text_out(nn.gelu(self.text_in(text[0]))), text[1])
        image = batch.context.get("image") if self.image_width else None
        if image is not None:
            image = (self.image(*image), image[1])
        condition, conditions = self._conditions(levels_BxN, batch)
        ids = {"segment": batch.segment}
        if self.window:
            for name, shift in (("window", False), ("shifted", True)):
                ids[name] = windows.window_ids(batch.segment, batch.coords, self.window, shift)
        table = None
        if self.rope:
            table = rope_table(batch.coords, self.width // self.heads, self.rope_theta, self.rope_pairs)
        x = noisy_BxSxP if batch.cond is None else jnp.concatenate([noisy_BxSxP, batch.cond], axis=-1)
        x = placed(self, self.embed(x).astype(jnp.float32), batch.coords)
        x, _ = self.blocks(x.astype(self.residual), conditions, batch.level, ids, table, text, image)
        if self.final == "table":
            ends = jnp.split(self.final_table, 2)
            shift, scale = (pick(condition + end, batch.level) for end in ends)
        else:
            ends = jnp.split(self.final_modulation(nn.silu(condition)), 2, axis=-1)
            shift, scale = (pick(end, batch.level) for end in ends)
        out = self.head(norm(x) * (1 + scale) + shift)
        return out if with_sigma or not self.learned_sigma else out[..., : self.features]

    def _conditions(self, levels_BxN: jax.Array, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """What the noise levels and labels say: ([B,N,W] for the end, what blocks get)."""
        if self.level_per_block:
            _, conditions = self.levels(None, levels_BxN, batch.vectors)
            repeat = len(layer_pattern(self.window, self.full_every))
            grouped = conditions.reshape(-1, repeat, *conditions.shape[1:]) if repeat > 1 else conditions
            return conditions[0], grouped
        waves = sinusoids(1000.0 * levels_BxN, SINUSOIDS, self.level_theta)
        condition = self.level_out(nn.silu(self.level_in(waves)))
        if self.classes:
            condition = condition + labels_of(batch.vectors, self.class_table)
        return condition, self.modulation(nn.silu(condition)) if self.shared_modulation else condition


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
    for key, known in (("qk_norm", QK_NORMS), ("absolute", places.HOW), ("final", FINALS)):
        if m[key] not in known:
            near = difflib.get_close_matches(str(m[key]), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"config.model.{key}={m[key]!r}: known are {', '.join(known)}{hint}")
    for key in ("mlp_dim", "classes", "cond", "image_width", "image_tokens"):
        if m[key] < 0:
            raise ConfigError(f"config.model.{key}={m[key]}: expected 0 or more")
    _check_places(m)
    for key, needs, there in (
        ("image_width", "cross", m.cross),
        ("image_tokens", "image_width", m.image_width),
        ("text_mlp", "cross", m.cross),
        ("cross_norm", "cross", m.cross),
    ):
        if m[key] and not there:
            raise ConfigError(f"config.model.{key}={m[key]}: has no meaning without config.model.{needs}")
    if m.level_per_block and m.shared_modulation:
        raise ConfigError(
            "config.model.level_per_block and shared_modulation: one modulation has one embedding of levels"
        )
    window = windows.from_config(config) or ()
    repeat = len(layer_pattern(window, m.full_every))
    if m.layers % repeat:
        near = max(1, round(m.layers / repeat)) * repeat
        raise ConfigError(
            f"config.model.layers={m.layers}: windows with config.model.full_every={m.full_every} repeat every "
            f"{repeat} layers; nearest: {near}"
        )


def _check_places(m: ConfigDict) -> None:
    """Raises ConfigError unless rope_pairs and table are what rope and absolute make of them."""
    pairs, half = tuple(m.rope_pairs), m.width // m.heads // 2
    if pairs and (len(pairs) != 3 or any(type(n) is not int or n < 0 for n in pairs) or sum(pairs) != half):
        raise ConfigError(
            f"config.model.rope_pairs={pairs}: expected pairs along (t, y, x) that sum to {half}, half of a head of "
            f"{2 * half}; nearest: {axis_widths(2 * half, 3)}"
        )
    table = tuple(m.table)
    if table and (len(table) != 3 or any(type(n) is not int or n < 1 for n in table)):
        raise ConfigError(f"config.model.table={table}: expected (t, y, x) in tokens, each 1 or more, or ()")
    if m.absolute == "table" and not table:
        raise ConfigError("config.model.absolute=table: expected config.model.table, (t, y, x) of the largest clip")
    if m.absolute == "table" and m.time_in_seconds:
        raise ConfigError("config.model.time_in_seconds: a table has places in latent frames; expected False")


def from_config(
    config: ConfigDict,
    features: int,
    text: nn.Module | None,
    layout: Layout | None = None,
    how: Attending = Attending(),  # noqa: B008 - frozen
) -> DiT:
    """The denoiser of a config, for tokens of `features` numbers; raises ConfigError.

    `text`: the encoder of byte ids, if there is one; a model without `config.model.cross` drops it.
    """
    m = config.model
    check(config)
    own = {field.name for field in dataclasses.fields(DiT)} & set(KEYS)
    return DiT(
        **{key: tuple(m[key]) if isinstance(m[key], list | tuple) else m[key] for key in own} | {"mlp_dim": mlp_dim(m)},
        features=features,
        text=text if m.cross else None,
        remat=m.remat,
        unroll=min(m.unroll, m.layers),
        dtype=dtype_of("dtype", config.dtype),
        residual=dtype_of("model.residual", m.residual),
        window=tuple(m.window),
        full_every=m.full_every,
        layout=layout,
        how=how,
    )
