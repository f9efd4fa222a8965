"""Training a denoiser on packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen.data.feed import batch_like
from vidgen.diffusion import generator as generators
from vidgen.models import dit
from vidgen.models.attention import check_heads, dtype_of
from vidgen.objectives import flow
from vidgen.parallel.mesh import batch_shardings, make_mesh
from vidgen.training.step import Inputs
from vidgen.training.task import Task


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the denoiser and its objective that can't be used."""
    dit.check(config)
    check_heads("text", config.text)
    dtype_of("model.residual", config.model.residual)
    flow.check(config.objective)


def mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Of all devices, or those given, over which the rows and their tokens divide; raises ConfigError."""
    return make_mesh(config.mesh, config.rows.count, config.rows.tokens, config.optimizer.accumulate, devices)


def task(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Task:
    """The denoiser of a config; its model is a `Generator`."""
    generator = generators.from_config(config, mesh, platform)
    errors = flow.loss_of(generator, config.objective)

    def loss(params, inputs: Inputs):
        return errors(params, inputs.batch, inputs.keys), (inputs.aux, {})

    like = batch_like(config, generator.tokenizer)
    return Task(
        model=generator,
        init=lambda key: (generator.init(key, generators.example(config)), None),
        losses=((0, loss),),
        weight=flow.trained,
        batch_like=like,
        batch_shardings=batch_shardings(mesh, like),
    )
