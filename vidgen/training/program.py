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
from vidgen.training import autoencoding, denoising, groups, optimizers
from vidgen.training import state as states
from vidgen.training.state import TrainState
from vidgen.training.step import Batch, Gradient, LossSum, Step, make_gradient, make_step
from vidgen.training.task import Task
from vidgen.weights import flatten, nest

TASKS = {"denoiser": denoising, "vae": autoencoding}


@dataclasses.dataclass(frozen=True)
class Program:
    """A training run without its data.

    Attributes:
      config, mesh: what it was built from.
      task: what is trained, and what its steps minimise.
      partition: of all its parameters into groups.
      whole_like: {path: ShapeDtypeStruct with its sharding} of all its parameters, those that are frozen too. Those are
        bfloat16 where they are that on disk, the same values at half the memory; all others are f32.
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
    partition: groups.Partition
    whole_like: dict[str, jax.ShapeDtypeStruct]
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
        if self.partition.freezes:
            return self.partition.split(nest(self.task.start.load(self.whole_like)))[1]
        return processes.put(self.task.frozen, self.state_shardings.frozen)

    def averaged(self, state: TrainState) -> Any:
        """The averaged weights of a state and those that don't train, as the model is called with."""
        return self.task.whole(state.ema, state.frozen)

    @property
    def step(self) -> Step:
        """The step as it is at the end of the run, when all losses have joined."""
        return self.steps[-1][1]

    def step_after(self, done: int) -> Step:
        """The step to take when so many have been."""
        return [step for start, step in self.steps if start <= done][-1]

    def loss_after(self, done: int) -> LossSum:
        """What the step to take when so many have been minimises."""
        return [loss for start, loss in self.task.losses if start <= done][-1]

    def gradient_after(self, done: int) -> Callable[[TrainState, Batch], Gradient]:
        """What that step takes its gradient with, to be jitted by whoever looks at that alone."""
        return make_gradient(self.loss_after(done), self.task.weight, self.config, self.state_shardings.params)


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
    groups.check(config)
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
    rules, sizes = rules_of(config.mesh), dict(mesh.shape)
    start, everything = task.start, jax.eval_shape(lambda: task.init(jax.random.key(config.seed))[0])
    dtypes = start.dtypes if start else {}
    partition = groups.partition(config, everything, dtypes)
    optimizer = optimizers.from_config(config, partition)

    def made(given: dict[str, jax.Array]) -> TrainState:
        """`given`: {path: array} of what trains and doesn't start from nothing."""
        params, aux = task.init(jax.random.key(config.seed))
        return states.create(partition.split(nest(flatten(params) | given))[0], optimizer, aux)

    state = jax.eval_shape(lambda: made({}))
    shardings = tree_shardings(state, mesh, rules)
    whole_like = flatten(_placed(everything, tree_shardings(everything, mesh, rules)))
    # What is frozen goes in as an argument: as a constant it would be in the program's text.
    if partition.freezes:
        halved = {path: x for path, x in flatten(partition.split(whole_like)[1]).items() if dtypes[path] == "bfloat16"}
        whole_like |= {p: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding) for p, x in halved.items()}
        frozen = partition.split(whole_like)[1]
        places = jax.tree.map(lambda x: x.sharding, frozen)
    else:
        frozen = jax.eval_shape(lambda: task.frozen)
        places = jax.tree.map(lambda _: NamedSharding(mesh, P()), frozen)
    begun = jax.jit(made, out_shardings=shardings, donate_argnums=0)
    state, shardings = state.replace(frozen=frozen), shardings.replace(frozen=places)
    check_sharded(
        audit(state.replace(frozen=frozen if partition.freezes else None), sizes, rules), sizes, config.mesh.rules
    )

    def init() -> TrainState:
        given = start.load(whole_like) if start else {}
        trains, kept = partition.split(given) if given else ({}, None)
        if not partition.freezes:
            kept = processes.put(task.frozen, places)
        return begun(flatten(trains)).replace(frozen=kept)

    options = compiler_options(mesh.devices.flat[0]) if config.mesh.compiler_options == "table" else {}

    def compiled(loss):
        return jax.jit(
            make_step(loss, task.weight, optimizer, config, shardings.params),
            in_shardings=(shardings, task.batch_shardings),
            out_shardings=(shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=options,
        )

    return Program(
        config=config,
        mesh=mesh,
        task=task,
        partition=partition,
        whole_like=whole_like,
        optimizer=optimizer,
        compiler_options=options,
        init=init,
        steps=tuple((start, compiled(loss)) for start, loss in task.losses),
        state_like=_placed(state, shardings),
        state_shardings=shardings,
        batch_like=_placed(task.batch_like, task.batch_shardings),
        batch_shardings=task.batch_shardings,
    )


def _placed(tree, shardings):
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
