"""Schedules and optimizers from a config."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from vidgen.config import ConfigError
from vidgen.parallel.mesh import path_name

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("cosine", "constant", "linear", "wsd")


def schedule(c: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then the config's schedule down to `final` · peak."""
    if c.schedule not in SCHEDULES:
        raise ConfigError(f"config.optimizer.schedule={c.schedule!r}: known are {', '.join(SCHEDULES)}")
    warmup = min(c.warmup, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    fall = rest // 5 if c.schedule == "wsd" else rest
    if c.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif c.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=c.final)
    else:
        decay = optax.linear_schedule(peak, peak * c.final, fall, transition_begin=rest - fall)
    # The first step is taken at peak / warmup and not at 0, where it would change nothing.
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), decay], [warmup])


def muon_dimensions(params: Any) -> Any:
    """Which axes of each array are a matrix for Muon; None for AdamW.

    Muon takes the matrices inside blocks, each layer of a stack on its own, and the convolutions inside a VAE's levels,
    whose windows and inputs are the rows. Embeddings, modulations, norms, biases, critics, and the first and last layer
    are AdamW's (Jordan et al., 2024).
    """

    def dimensions(path, x):
        name = path_name(path)
        if re.match(r"vae/(en|de)coder/\w+_block.*kernel$", name):
            return MuonDimensionNumbers(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1)
        inside = name.startswith(("blocks/", "text/")) and name.endswith("kernel") and "modulation" not in name
        return MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1) if inside else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def from_config(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a config, without clipping, which the step does; raises ConfigError."""
    c = config.optimizer
    if c.name not in OPTIMIZERS:
        raise ConfigError(f"config.optimizer.name={c.name!r}: known are {', '.join(OPTIMIZERS)}")
    lr = schedule(c, c.lr, config.train.steps)
    if c.name == "adamw":
        return optax.adamw(lr, b1=c.beta1, b2=c.beta2, weight_decay=c.weight_decay, mask=matrices)
    return muon(
        schedule(c, c.muon_lr, config.train.steps),
        beta=c.momentum,
        weight_decay=c.weight_decay,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        adam_learning_rate=lr,
        muon_weight_dimension_numbers=muon_dimensions,
    )


def clipped(grads: Any, most: float) -> tuple[jax.Array, Any]:
    """(global norm, gradients scaled to a norm of at most `most`; 0: as they are).

    Those of "critics", which play against the rest, are scaled by a norm of their own. The norm returned is that of the
    rest, and not finite where theirs is not.
    """
    if isinstance(grads, dict) and "critics" in grads:
        norm, rest = clipped({name: value for name, value in grads.items() if name != "critics"}, most)
        theirs, critics = clipped(grads["critics"], most)
        return norm + 0.0 * theirs, rest | {"critics": critics}
    norm = optax.tree.norm(grads)
    if most:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-12)), grads)
    return norm, grads


def matrices(params: Any) -> Any:
    """True for what weight decay acts on: kernels and embeddings, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith(("kernel", "embedding")), params)
