"""A tokenizer and a denoiser that belong together: what is trained, and what samples are drawn from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.diffusion import path, unipc
from vidgen.diffusion.guidance import guided
from vidgen.diffusion.solvers import integrate
from vidgen.diffusion.timesteps import sampling_times
from vidgen.models import attend, backbones
from vidgen.models.linear import Layout
from vidgen.parallel.rules import rules_of
from vidgen.text import encoder, frozen
from vidgen.text.frozen import FrozenEncoder
from vidgen.tokenizers import base as tokenizers


@dataclasses.dataclass(frozen=True)
class Generator:
    """Frozen and hashable; parameters are passed in, but for those of a learned tokenizer and of a frozen text encoder,
    which stay as they are.

    text: the frozen encoder that captions go through before they are in a row; None where the denoiser's own encoder
      reads them as bytes.
    """

    tokenizer: tokenizers.Tokenizer
    denoiser: nn.Module
    text: FrozenEncoder | None = None

    def init(self, key: jax.Array, batch: TokenBatch) -> Any:
        """Parameters, float32; `batch` gives the shapes only: `example(config)`."""
        noisy = jnp.zeros((*batch.segment.shape, self.tokenizer.geometry.features))
        return self._on_one_device().denoiser.init(key, noisy, jnp.zeros((1, 2)), batch)["params"]

    @property
    def mesh(self) -> Mesh | None:
        """Over which its layers spread their work; None: one device."""
        return self.denoiser.layout and self.denoiser.layout.mesh

    def _on_one_device(self) -> Generator:
        """The same, with the same parameters, for a row that does not divide over the mesh."""
        text = self.denoiser.text and self.denoiser.text.clone(layout=None)
        denoiser = self.denoiser.clone(layout=None, how=attend.Attending(), text=text)
        return dataclasses.replace(self, denoiser=denoiser)

    def predict(self, params: Any, noisy_BxSxP: jax.Array, levels_BxN: jax.Array, batch: TokenBatch) -> jax.Array:
        """What the denoiser puts out, [B,S,P] f32."""
        return self.denoiser.apply({"params": params}, noisy_BxSxP, levels_BxN, batch)

    def encode_context(self, params: Any, batch: TokenBatch) -> TokenBatch:
        """`batch` with its text as values."""
        return self.denoiser.apply({"params": params}, batch, method="encode_context")


@struct.dataclass
class Experts:
    """Parameters of two denoisers of one architecture, each for a range of noise levels (Wan 2.2's mixture).

    Attributes:
      high: for noise levels from `boundary` on, where sampling starts.
      low: for those below.
      boundary: in [0, 1].
    """

    high: Any
    low: Any
    boundary: float = struct.field(pytree_node=False)


def from_config(config: ConfigDict, mesh: Mesh | None = None, platform: str | None = None) -> Generator:
    """The generator of a config; raises ConfigError.

    Args:
      mesh: over which its layers spread their work; None: written for one device, though the compiler may spread it.
      platform: cpu, tpu or gpu, for which attention picks its kernel; the mesh's or the default device's unless given.
    """
    tokenizer = tokenizers.from_config(config.tokenizer, config.vae)
    several = mesh is not None and mesh.size > 1
    layout = Layout(mesh, rules_of(config.mesh)) if several else None
    if platform is None:
        platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    backbones.check(config)
    how = backbones.attending(config, mesh if several else None, platform)
    text = encoder.from_config(config, layout)
    denoiser = backbones.from_config(config, tokenizer.geometry.features, text, layout, how)
    return Generator(tokenizer, denoiser, frozen.from_config(config))


def example(config: ConfigDict) -> TokenBatch:
    """A row of zeros in the shapes of a config: what parameters are initialised with."""
    r = config.rows
    ids, text = np.zeros((1, r.text), np.int32), frozen.from_config(config)
    values = np.zeros((1, r.text, text.width), np.float32) if text else ids
    segment = np.zeros((1, r.tokens), np.int32)
    coords = np.zeros((1, r.tokens, 3), np.float32)
    return TokenBatch(tokens=None, coords=coords, segment=segment, level=segment, context={"text": (values, ids)})


def generate(
    generator: Generator,
    params: Any,
    batch: TokenBatch,
    unconditional: TokenBatch | None,
    noise_BxSxP: jax.Array,
    keys_B: jax.Array,
    objective: ConfigDict,
    *,
    solver: str,
    steps: int,
    guidance: float | tuple[float, float],
    eta: float,
    clip_tokens: int,
) -> jax.Array:
    """Draws tokens [B,S,P] f32 for rows of one clip each, of `clip_tokens` and then padding; noise level 1 of the row's
    two is the clip's own.

    Args:
      params: of the denoiser, or `Experts`.
      batch: rows with prompts; `tokens` are what to keep where `known` is True, and are not looked at elsewhere.
      unconditional: the same rows with the negative prompt, or None for no guidance.
      noise_BxSxP: standard normal.
      keys_B: a key a row, for the fresh noise of DDIM with eta > 0.
      guidance: of both experts, or (of the high, of the low).
    """
    two = isinstance(params, Experts)
    scales = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    experts = []
    for own, scale in zip((params.high, params.low) if two else (params,), scales, strict=False):
        rows = generator.encode_context(own, batch)
        empty = None if unconditional is None else generator.encode_context(own, unconditional)
        experts.append((own, rows, empty, scale))

    def keep(x):
        return x if batch.known is None else jnp.where(batch.known, batch.tokens, x)

    def velocity(x, t, told=None):
        told = t if told is None else told
        x = keep(x)
        levels = jnp.stack([jnp.zeros_like(t), told]) * jnp.ones((x.shape[0], 1))  # level 0 is clean

        def of(own, rows, empty, scale):
            def predict(rows):
                prediction = generator.predict(own, x, levels, rows)
                return path.velocity_from(objective.prediction, prediction, x, t)

            v = predict(rows)
            return v if empty is None else guided(v, predict(empty), scale)

        if not two:
            return of(*experts[0])
        return jax.lax.cond(told >= params.boundary, lambda: of(*experts[0]), lambda: of(*experts[1]))

    times = sampling_times(objective, steps, clip_tokens, solver)
    if solver == "unipc":
        return keep(unipc.solve(velocity, noise_BxSxP, times))
    if objective.prediction == "noise":  # which says nothing of the clean signal where all is noise
        times = np.minimum(times, 0.98)
    return keep(integrate(velocity, noise_BxSxP, times, solver, keys_B, eta))
