"""What a config and a mesh decide before there are any clips: the step that trains, and the shapes and places of all it
works on. `vidgen train` runs it; `vidgen plan` compiles the very same for devices that aren't there.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.models.attention import dtype_of
from vidgen.parallel import processes
from vidgen.parallel.rules import audit, check_sharded, rules_of, tree_shardings
from vidgen.planning.hardware import compiler_options
from vidgen.training import autoencoding, denoising, optimizers
from vidgen.training import state as states
from vidgen.training.state import TrainState
from vidgen.training.step import Batch, Step, make_step
from vidgen.training.task import Task

TASKS = {"denoiser": denoising, "vae": autoencoding}


@dataclasses.dataclass(frozen=True)
class Program:
    """A training run without its data.

    Attributes:
      config, mesh: what it was built from.
      task: what is trained, and what its steps minimise.
      optimizer: of the config.
      compiler_options: that the step is compiled with, of the table in `vidgen/planning/hardware.py`.
      init: () → the state before the first step, made straight into its sharding.
      steps: ((steps done before it is used, step), …); a step is (state, batch) → (state, metrics on every device);
        jitted, and takes over the memory of the state.
      state_like: the state as ShapeDtypeStructs with shardings: to restore into, and to lower a step with.
      state_shardings: the same tree, of shardings.
      batch_like: the largest batch that the feed makes, as ShapeDtypeStructs with shardings; pixels are u8.
      batch_shardings: the same tree, of shardings.
    """

    config: ConfigDict
    mesh: Mesh
    task: Task
    optimizer: optax.GradientTransformation
    compiler_options: dict[str, str]
    init: Callable[[], TrainState]
    steps: tuple[tuple[int, Step], ...]
    state_like: TrainState
    state_shardings: TrainState
    batch_like: Batch
    batch_shardings: Batch

    @property
    def generator(self) -> Any:
        """What the task trains: of a denoiser's, a `vidgen.diffusion.generator.Generator`; of a VAE's, its module."""
        return self.task.model

    def frozen(self) -> Any:
        """What is frozen of a state, on the devices: checkpoints don't have it."""
        return processes.put(self.task.frozen, self.state_shardings.frozen)

    @property
    def step(self) -> Step:
        """The step as it is at the end of the run, when all losses have joined."""
        return self.steps[-1][1]

    def step_after(self, done: int) -> Step:
        """The step to take when so many have been."""
        return [step for start, step in self.steps if start <= done][-1]


def task_of(config: ConfigDict) -> Any:
    """The module of `config.task`; raises ConfigError."""
    if config.task not in TASKS:
        near = difflib.get_close_matches(config.task, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.task={config.task!r}: known are {', '.join(TASKS)}{hint}")
    return TASKS[config.task]


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of the program that can't be used, whatever the mesh."""
    configs.check(config)
    dtype_of("dtype", config.dtype)
    optimizers.from_config(config)
    task_of(config).check(config)
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
    task = task_of(config).task(config, mesh, platform)
    optimizer = optimizers.from_config(config)

    def init() -> TrainState:
        params, aux = task.init(jax.random.key(config.seed))
        return states.create(params, optimizer, aux)

    state = jax.eval_shape(init)
    rules, sizes = rules_of(config.mesh), dict(mesh.shape)
    check_sharded(audit(state, sizes, rules), sizes, config.mesh.rules)
    whole = NamedSharding(mesh, P())
    shardings = tree_shardings(state, mesh, rules)
    made = jax.jit(init, out_shardings=shardings)
    # What is frozen goes in as an argument: as a constant it would be in the program's text.
    frozen = jax.eval_shape(lambda: task.frozen)
    state = state.replace(frozen=frozen)
    shardings = shardings.replace(frozen=jax.tree.map(lambda _: whole, frozen))
    options = compiler_options(mesh.devices.flat[0]) if config.mesh.compiler_options == "table" else {}

    def compiled(loss):
        return jax.jit(
            make_step(loss, task.weight, optimizer, config, shardings.params),
            in_shardings=(shardings, task.batch_shardings),
            out_shardings=(shardings, whole),
            donate_argnums=0,
            compiler_options=options,
        )

    return Program(
        config=config,
        mesh=mesh,
        task=task,
        optimizer=optimizer,
        compiler_options=options,
        init=lambda: made().replace(frozen=processes.put(task.frozen, shardings.frozen)),
        steps=tuple((start, compiled(loss)) for start, loss in task.losses),
        state_like=_placed(state, shardings),
        state_shardings=shardings,
        batch_like=_placed(task.batch_like, task.batch_shardings),
        batch_shardings=task.batch_shardings,
    )


def _placed(tree, shardings):
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
