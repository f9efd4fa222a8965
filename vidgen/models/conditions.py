"""What a denoiser is told beside the tokens: noise levels, labels, image features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.models.blocks import Norm
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.models.places import sinusoids

SINUSOIDS = 256  # numbers that a noise level is told in, before the first layer


def encoded(batch: TokenBatch, text: nn.Module | None) -> TokenBatch:
    """`batch` with its text as values: ids go through `text`. Raises ConfigError for ids where that is None."""
    if "text" not in batch.context:
        return batch
    values, segment = batch.context["text"]
    if jnp.issubdtype(values.dtype, jnp.integer):
        if text is None:
            raise ConfigError("text as ids, and the model has no encoder for them; expected values [B,L,E]")
        values = text(values, segment)
    return batch.replace(context=batch.context | {"text": (values, segment)})


def complete(
    batch: TokenBatch,
    levels: int,
    making: bool,
    *,
    cond: int,
    classes: int,
    image_width: int = 0,
    image_tokens: int = 0,
) -> TokenBatch:
    """The batch of a model with these settings, of which it must have the inputs and no others; ConfigError else.

    `levels`: noise levels of a row. `making`: while parameters are made, what is missing is zeros.
    """
    rows, tokens = batch.segment.shape
    values, _ = batch.context.get("image", (None, None))

    def missing(name: str, setting: int, field: str, array: Any, shape: tuple[int, ...]) -> bool:
        told = f"config.model.{name}={setting}"
        if array is not None and (not setting or field != "vectors" and array.shape[-1] != shape[-1]):
            raise ConfigError(f"{told}: rows bring {field} {list(array.shape)}; expected {shape[-1] or 'no'} numbers")
        if array is None and setting and not making:
            raise ConfigError(f"{told}: expected rows with {field} {list(shape)}, found none")
        return array is None and setting > 0

    if missing("cond", cond, "cond", batch.cond, shape := (rows, tokens, cond)):
        batch = batch.replace(cond=jnp.zeros(shape))
    if missing("classes", classes, "vectors", batch.vectors, shape := (rows, levels, min(classes, 1))):
        batch = batch.replace(vectors=jnp.zeros(shape))
    shape = (rows, max(image_tokens, 1), image_width)
    if missing("image_width", image_width, "image features", values, shape):
        image = (jnp.zeros(shape), jnp.zeros(shape[:2], jnp.int32))
        batch = batch.replace(context=batch.context | {"image": image})
    return batch


def labels_of(vectors_BxNxV: jax.Array, table_CxW: jax.Array) -> jax.Array:
    """Each noise level's row of the table, by the label in `vectors[..., 0]`; [B,N,W] f32, zeros where it has none."""
    # A product with a one-hot matrix, as in `blocks.pick`.
    hot = jax.nn.one_hot(jnp.round(vectors_BxNxV[..., 0]).astype(jnp.int32), table_CxW.shape[0], dtype=jnp.float32)
    return jnp.einsum("bnc,cw->bnw", hot, table_CxW, precision="highest")


def class_table(module: nn.Module, classes: int, width: int) -> jax.Array:
    """The embeddings of labels, and one more for none, as a parameter of `module`."""
    init = nn.initializers.normal(0.02)
    return module.param("class_embedding", init, (classes + 1, width), jnp.float32)


class LevelsOfBlock(nn.Module):
    """A block's own embedding of noise levels and labels; a layer of a scan.

    Attributes:
      classes: labels that there are; 0 = none.
      theta: the longest wavelength over 2π.
    """

    width: int
    classes: int
    theta: float
    layout: Layout | None = None

    @nn.compact
    def __call__(self, carry, levels_BxN: jax.Array, vectors_BxNxV: jax.Array | None) -> tuple[None, jax.Array]:
        """Returns (carry, [B,N,W] f32)."""

        def linear(name):
            return Linear(self.width, precision="highest", layout=self.layout, over_context=False, name=name)

        waves = sinusoids(1000.0 * levels_BxN, SINUSOIDS, self.theta)
        out = linear("level_out")(nn.silu(linear("level_in")(waves)))
        if self.classes:
            out = out + labels_of(vectors_BxNxV, class_table(self, self.classes, self.width))
        return carry, out


class EmbedImage(nn.Module):
    """Features of an image encoder → what blocks attend to: norm, two matrices with an exact GELU between, norm.

    Attributes:
      width: of what comes out.
      tokens: features a clip has, which get learned positions first; 0 = none do.
    """

    width: int
    tokens: int = 0
    dtype: Dtype = jnp.float32
    layout: Layout | None = None

    @nn.compact
    def __call__(self, image_BxLxE: jax.Array, segment_BxL: jax.Array) -> jax.Array:
        """[B,L,E], segments → [B,L,W] f32. A segment's features lie side by side, `tokens` of them if that is set."""
        features = image_BxLxE.shape[-1]

        def linear(width, name):
            return Linear(width, dtype=self.dtype, layout=self.layout, over_context=False, name=name)

        x = image_BxLxE.astype(jnp.float32)
        if self.tokens:
            table = self.param("place_table", nn.initializers.zeros, (self.tokens, features), jnp.float32)
            x = x + jnp.take(table, rank_in_segment(segment_BxL), axis=0, mode="clip")
        x = nn.gelu(linear(features, "up")(Norm(1e-5, name="norm_in")(x)), approximate=False)
        return Norm(1e-5, name="norm_out")(linear(self.width, "down")(x))


def rank_in_segment(segment_BxL: jax.Array) -> jax.Array:
    """How many places before it each one's segment began, [B,L] i32; segments lie side by side."""
    place = jnp.broadcast_to(jnp.arange(segment_BxL.shape[1]), segment_BxL.shape)
    begins = segment_BxL != jnp.pad(segment_BxL, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
