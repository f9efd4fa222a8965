"""Training a denoiser on packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vidgen.conditioning import masks
from vidgen.data.feed import batch_like
from vidgen.diffusion import generator as generators
from vidgen.models import backbones, lora
from vidgen.models.attention import check_heads, dtype_of
from vidgen.objectives import flow
from vidgen.parallel.mesh import batch_shardings, make_mesh
from vidgen.training import groups, start
from vidgen.training.step import Inputs
from vidgen.training.task import Task


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the denoiser and its objective that can't be used."""
    backbones.check(config)
    check_heads("text", config.text)
    dtype_of("model.residual", config.model.residual)
    flow.check(config.objective)
    masks.check(config)


def mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Of all devices, or those given, over which the rows and their tokens divide; raises ConfigError."""
    return make_mesh(config.mesh, config.rows.count, config.rows.tokens, config.optimizer.accumulate, devices)


def task(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Task:
    """The denoiser of a config; its model is a `Generator`."""
    generator = generators.from_config(config, mesh, platform)
    errors = flow.loss_of(generator, config.objective, config.control)

    def whole(params, frozen):
        return lora.scaled(groups.join(params, frozen), lora.scale(config.lora))

    def loss(params, inputs: Inputs):
        return errors(whole(params, inputs.frozen), inputs.batch, inputs.keys), (inputs.aux, {})

    like = batch_like(config, generator.tokenizer, generator.text)
    return Task(
        model=generator,
        init=lambda key: (start.init(config, generator, key), None),
        losses=((0, loss),),
        weight=flow.weight_of(config.control),
        batch_like=like,
        batch_shardings=batch_shardings(mesh, like),
        start=start.find(config, generator),
        whole=whole,
    )
