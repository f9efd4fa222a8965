"""The loss on clips that are not trained on, at fixed noise levels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.data import feed
from vidgen.data.sources import open_source
from vidgen.diffusion.generator import Generator
from vidgen.diffusion.timesteps import evaluation_levels
from vidgen.objectives import flow
from vidgen.training.step import row_keys

LEVELS = 8


def heldout_loss(config: ConfigDict, generator: Generator, mesh: Mesh) -> Callable[..., dict[str, float]]:
    """(params, pause) → {"heldout_loss", "heldout_loss/level_0" … "level_7"}, the same on every process; all call it.

    The same rows of clips (`train.eval_rows`, rounded up to whole steps), noise and levels every time: the middles of
    eighths of the levels trained on, from little noise to much. `heldout_loss` is their mean.
    A learned tokenizer encodes the rows once, whatever cache training reads, and its latents are the posteriors' means.
    "heldout_unreadable" counts clips that stayed out because they could not be read. `pause`, where there is one, is
    called before each step of rows, and may raise to end it there.
    """
    source = open_source(config.data, "heldout")
    tokenizer, text = generator.tokenizer, generator.text
    packing = feed.plan(source, tokenizer, config, text)
    steps = max(1, -(-config.train.eval_rows // config.rows.count))
    place = feed.Placement(mesh, config, tokenizer, text)
    levels_of = functools.partial(evaluation_levels, config.objective, count=LEVELS)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def sums(params, batch, step):
        keys = row_keys(config.seed + 1, step, config.rows.count)  # not the keys that this step trains with
        errors, weight = flow.heldout_sums(generator, params, batch, keys, config.objective, levels_of, config.control)
        return errors, weight, jnp.sum(batch.clip >= 0)

    def rows(n: int) -> TokenBatch:
        return feed.host_rows(source, packing, tokenizer, config, n, place.local, text)

    if tokenizer.learned:  # reading is cheap, a VAE is not
        rows = functools.cache(rows)

    def loss(params: Any, pause: Callable[[], None] = lambda: None) -> dict[str, float]:
        total, tokens, unreadable = np.zeros(LEVELS), 0.0, 0
        for n in range(steps):
            pause()
            batch = place(rows(n))
            errors, weight, clips = jax.device_get(sums(params, batch, np.int32(n)))
            total, tokens = total + np.asarray(errors, np.float64), tokens + float(weight)
            unreadable += sum(map(len, packing.step(n))) - int(clips)
        by_level = total / max(tokens, 1.0)
        levels = {f"heldout_loss/level_{i}": float(x) for i, x in enumerate(by_level)}
        return {"heldout_loss": float(by_level.mean()), "heldout_unreadable": float(unreadable)} | levels

    return loss
