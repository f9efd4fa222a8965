"""Schedules and optimizers from a config."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from vidgen.config import ConfigError
from vidgen.parallel.mesh import path_name
from vidgen.training import galore
from vidgen.training.groups import Partition
from vidgen.training.stacks import is_stacked

OPTIMIZERS = ("muon", "adamw", "adafactor", "galore")
SCHEDULES = ("cosine", "constant", "linear", "wsd")
FACTORED = 32  # sides of a matrix from which on Adafactor keeps sums of rows and columns instead of it


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


def rates(c: ConfigDict, peak: float, steps: int) -> np.ndarray:
    """[steps] f32: the learning rate of every step, on the host, which need not wait for a device to know it."""
    return np.asarray(jax.jit(jax.vmap(schedule(c, peak, steps)))(np.arange(steps)))


def muon_dimensions(params: Any) -> Any:
    """Which axes of each array are a matrix for Muon; None for AdamW.

    Muon takes the matrices inside blocks, each layer of a stack on its own, and the convolutions inside a VAE's levels,
    whose windows and inputs are the rows. Embeddings, modulations, norms, biases, critics, low-rank updates, and the
    first and last layer are AdamW's (Jordan et al., 2024).
    """

    def dimensions(path, x):
        name = path_name(path)
        if re.match(r"vae/(en|de)coder/\w+_block.*kernel$", name):
            return MuonDimensionNumbers(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1)
        inside = re.match(r"(blocks|text)/.*kernel$", name) and not re.search(r"modulation|/level", name)
        return MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1) if inside else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def from_config(config: ConfigDict, partition: Partition | None = None) -> optax.GradientTransformation:
    """The optimizer of a config, without clipping, which the step does; raises ConfigError.

    `partition`: of the parameters into groups; each group that trains has an optimizer of its own learning rate and
    weight decay. None: all parameters are one group.
    """
    c = config.optimizer
    if c.name not in OPTIMIZERS:
        raise ConfigError(f"config.optimizer.name={c.name!r}: known are {', '.join(OPTIMIZERS)}")

    def one(factor: float, weight_decay: float) -> optax.GradientTransformation:
        lr = schedule(c, factor * c.lr, config.train.steps)
        if c.name == "muon":
            return muon(
                schedule(c, factor * c.muon_lr, config.train.steps),
                beta=c.momentum,
                weight_decay=weight_decay,
                adam_b1=c.beta1,
                adam_b2=c.beta2,
                adam_learning_rate=lr,
                muon_weight_dimension_numbers=muon_dimensions,
            )
        if c.name == "adafactor":
            return _adafactor(c, lr, weight_decay)
        if c.name == "galore":
            return _galore(c, lr, weight_decay)
        return optax.adamw(lr, b1=c.beta1, b2=c.beta2, weight_decay=weight_decay, mask=matrices)

    if partition is None or not partition.set:
        return one(1.0, c.weight_decay)
    own = {
        str(i): one(group.lr, c.weight_decay if group.weight_decay is None else group.weight_decay)
        for i, group in enumerate(partition.groups)
        if not group.frozen
    }
    return optax.partition(own, _by_path(lambda path, x: str(partition.of[path])))


def _adafactor(c: ConfigDict, lr: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, arXiv:1804.04235) without its own schedule and without scaling by parameters, so that
    `lr` means what it does for AdamW. Each layer of a stack is factored, and its update clipped, on its own; `beta1` of
    0 leaves out the momentum, and with it nearly all of the state.
    """
    scaled = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED),
        optax.clip_by_block_rms(1.0),
    )

    def label(path, x):  # one label for a number of layers, since those go through `vmap` together
        return f"{x.shape[0]} layers" if is_stacked(path) else "single"

    def either(params):
        stacks = {label(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)}
        inner = {name: scaled if name == "single" else _of_layers(scaled) for name in stacks}
        return optax.partition(inner, _by_path(label))

    return optax.chain(
        optax.GradientTransformation(
            lambda params: either(params).init(params),
            lambda grads, state, params=None: either(grads).update(grads, state, params),
        ),
        optax.ema(c.beta1, debias=False) if c.beta1 else optax.identity(),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.scale_by_learning_rate(lr),
    )


def _of_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation for each layer of stacked arrays on its own."""
    return optax.GradientTransformation(
        jax.vmap(inner.init),
        lambda grads, state, params=None: jax.vmap(inner.update)(grads, state, params),
    )


def _galore(c: ConfigDict, lr: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """GaLore for the matrices inside blocks. Tables that text is looked up in, whose gradients are a few rows, have
    Adafactor's factored second moment and no first, which is almost nothing to keep; all else, Adam.
    """
    projected = optax.chain(
        galore.scale_by_galore(c.beta1, c.beta2, c.galore_rank, c.galore_every), optax.scale(c.galore_scale)
    )
    factored = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED), optax.clip_by_block_rms(1.0))

    def label(path, x):
        if path.endswith("embedding"):
            return "factored"
        return "galore" if galore.takes(path, x, c.galore_rank) else "adam"

    kinds = {"galore": projected, "factored": factored, "adam": optax.scale_by_adam(c.beta1, c.beta2)}
    return optax.chain(
        optax.partition(kinds, _by_path(label)),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.scale_by_learning_rate(lr),
    )


def _by_path(label: Callable[[str, Any], str]) -> Callable[[Any], Any]:
    """params → a tree of labels, by path and array."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, x: label(path_name(path), x), params)


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> int:
    """Of the optimizer's state; `params` may hold shapes only."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))


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
