"""The loss on clips that are not trained on, at fixed noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.diffusion.generator import Generator
from vidgen.objectives import flow
from vidgen.training.step import row_keys

LEVELS = 8


def heldout_loss(config: ConfigDict, generator: Generator, rows: NamedSharding) -> Callable[[Any], dict[str, float]]:
    """params → {"heldout_loss", "heldout_loss/level_0" … "level_7"}.

    The same rows of clips (`train.eval_rows`, rounded up to whole steps), noise and levels every time: the middles of
    eighths of the levels trained on, from little noise to much. `heldout_loss` is their mean.
    "heldout_unreadable" counts clips that stayed out because they could not be read.
    """
    source = open_source(config.data, "heldout")
    geometry = generator.tokenizer.geometry
    packing = Packing(source.sizes, geometry, config.rows, config.seed)
    steps = max(1, -(-config.train.eval_rows // config.rows.count))

    @jax.jit
    def sums(params, batch, keys):
        return flow.heldout_sums(generator, params, batch, keys, config.objective, LEVELS)

    def loss(params: Any) -> dict[str, float]:
        total, tokens, unreadable = np.zeros(LEVELS), 0.0, 0
        for n in range(steps):
            batch = feed.host_rows(source, packing, geometry, config, n)
            unreadable += sum(map(len, packing.step(n))) - int((batch.clip >= 0).sum())
            batch = jax.device_put(batch, rows)
            # Not the keys that step n trains with.
            errors, weight = sums(params, batch, row_keys(config.seed + 1, np.int32(n), config.rows.count))
            total, tokens = total + np.asarray(errors, np.float64), tokens + float(weight)
        by_level = total / max(tokens, 1.0)
        levels = {f"heldout_loss/level_{i}": float(x) for i, x in enumerate(by_level)}
        return {"heldout_loss": float(by_level.mean()), "heldout_unreadable": float(unreadable)} | levels

    return loss
