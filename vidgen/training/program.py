"""What a config and a mesh decide before there are any clips: the step that trains, and the shapes and places of all it
works on. `vidgen train` runs it; `vidgen plan` compiles the very same for devices that aren't there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.data.feed import batch_like
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.models import dit
from vidgen.models.attention import check_heads, dtype_of
from vidgen.objectives import flow
from vidgen.parallel.mesh import batch_shardings
from vidgen.parallel.rules import audit, check_sharded, rules_of, tree_shardings
from vidgen.planning.hardware import compiler_options
from vidgen.training import optimizers
from vidgen.training import state as states
from vidgen.training.state import TrainState
from vidgen.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A training run without its data.

    Attributes:
      config, mesh: what it was built from.
      generator, optimizer: of the config.
      compiler_options: that the step is compiled with, of the table in `vidgen/planning/hardware.py`.
      init: () → the state before the first step, made straight into its sharding; jitted.
      step: (state, batch) → (state, metrics on every device); jitted, and takes over the memory of the state.
      state_like: the state as ShapeDtypeStructs with shardings: to restore into, and to lower `step` with.
      state_shardings: the same tree, of shardings.
      batch_like: a batch just as the feed makes it, as ShapeDtypeStructs with shardings; tokens are u8 pixel blocks.
      batch_shardings: the same tree, of shardings.
    """

    config: ConfigDict
    mesh: Mesh
    generator: Generator
    optimizer: optax.GradientTransformation
    compiler_options: dict[str, str]
    init: Callable[[], TrainState]
    step: Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, jax.Array]]]
    state_like: TrainState
    state_shardings: TrainState
    batch_like: TokenBatch
    batch_shardings: TokenBatch


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the program that can't be used, whatever the mesh."""
    configs.check(config)
    dit.check(config)
    check_heads("text", config.text)
    for name, value in (("dtype", config.dtype), ("model.residual", config.model.residual)):
        dtype_of(name, value)
    optimizers.from_config(config)
    flow.check(config.objective)
    rules_of(config.mesh)
    if config.mesh.compiler_options not in ("table", "none"):
        raise ConfigError(f"config.mesh.compiler_options={config.mesh.compiler_options!r}: known are table, none")


def build(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Program:
    """The program of a config on a mesh, whose devices need not exist: nothing is computed or placed on them.

    Args:
      platform: whose kernels to choose: cpu, gpu or tpu; the mesh's own unless given.

    Raises:
      ConfigError: settings that don't fit together or don't fit the mesh; a large array that would lie whole on each
        device though the mesh is there to share it.
    """
    check(config)
    generator = generators.from_config(config, mesh, platform)
    optimizer = optimizers.from_config(config)

    def init() -> TrainState:
        return states.create(generator.init(jax.random.key(config.seed), generators.example(config)), optimizer)

    state = jax.eval_shape(init)
    rules, sizes = rules_of(config.mesh), dict(mesh.shape)
    check_sharded(audit(state, sizes, rules), sizes, config.mesh.rules)
    state_shardings = tree_shardings(state, mesh, rules)
    batch = batch_like(config, generator.tokenizer.geometry)
    batch_places = batch_shardings(mesh, batch)
    step = make_step(flow.loss_of(generator, config.objective), flow.trained, optimizer, config, state_shardings.params)
    options = compiler_options(mesh.devices.flat[0]) if config.mesh.compiler_options == "table" else {}
    return Program(
        config=config,
        mesh=mesh,
        generator=generator,
        optimizer=optimizer,
        compiler_options=options,
        init=jax.jit(init, out_shardings=state_shardings),
        step=jax.jit(
            step,
            in_shardings=(state_shardings, batch_places),
            out_shardings=(state_shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=options,
        ),
        state_like=_placed(state, state_shardings),
        state_shardings=state_shardings,
        batch_like=_placed(batch, batch_places),
        batch_shardings=batch_places,
    )


def _placed(tree, shardings):
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
