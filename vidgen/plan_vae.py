"""Planning the training of a VAE: its step compiled for machines that aren't there, on the chunks that fill it most.

Compiled are the compiler's facts, as in `vidgen/plan.py`; of the time only a bound is told, since nothing here knows
how near to its peak a chip convolves.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.parallel.mesh import AXES
from vidgen.parallel.rules import audit, check_sharded, rules_of
from vidgen.planning import aot
from vidgen.planning.compiled import compile_for
from vidgen.planning.hardware import Topology
from vidgen.planning.layout import on, parse_mesh
from vidgen.studio import plans
from vidgen.tokenizers.vae import CausalVAE
from vidgen.train_vae import useful_flops
from vidgen.training import autoencoding, optimizers
from vidgen.training import program as programs
from vidgen.training import state as states
from vidgen.training.state import TrainState


def run(config: ConfigDict, topology: Topology, mesh: str = "", abstract: bool = False) -> dict[str, Any]:
    """Prints a report of one step over `autoencoding.largest(config)` chunks and returns its figures.

    Args:
      mesh: as `vidgen.plan.run` takes it.
      abstract: nothing is compiled.

    Raises ConfigError.
    """
    sizes = dict.fromkeys(AXES, 1) | parse_mesh(mesh) if mesh else {axis: config.mesh[axis] for axis in AXES}
    config = on(config, topology, sizes)
    autoencoding.check(config)  # of a mesh that was given, too
    shape = autoencoding.largest(config)
    own = {axis: config.mesh[axis] for axis in AXES}
    if abstract:
        vae, like = state_of(config)
    else:
        program = programs.build(config, autoencoding.mesh(config, aot.devices(topology)))
        vae, like = program.task.model, program.state_like.replace(frozen=None)
    flops = useful_flops(vae, shape)
    state = audit(like, own, rules_of(config.mesh))
    check_sharded(state, own, config.mesh.rules)
    parameters = states.count(like.params["vae"])
    bound = flops / (topology.chip.flops * topology.devices)
    facts = {
        "topology": topology.text,
        "mode": "train",
        "task": "vae",
        "mesh": own,
        "chunks": shape.count,
        "chunk": shape.text,
        "parameters": parameters,
        "useful_flops": flops,
        "seconds_at_the_peak": bound,
        "state_bytes_per_device": sum(p.bytes_per_device for p in state),
    }
    print(plans.vae_introduction(config, topology, facts, [s.text for s in autoencoding.shapes(config)]))
    print(plans.state(state, own, most=10), flush=True)
    if abstract:
        return facts
    arguments = (program.state_like, program.batch_like)
    found = compile_for(topology, own, program.step, arguments, program.compiler_options)
    print(plans.compiled(found), flush=True)
    if not found.fits:
        remat = "" if config.vae.remat else ", or config.vae.remat=True"
        print(f"\n  it would want a larger mesh.context or fewer chunks a step{remat}")
    return facts | found.facts()


def state_of(config: ConfigDict) -> tuple[CausalVAE, TrainState]:
    """(the VAE, the shapes of what trains it) on the config's mesh, whose devices nobody has to know.

    Raises ConfigError where chunks don't divide over the mesh.
    """
    sizes = tuple(config.mesh[axis] for axis in AXES)
    task = autoencoding.task(config, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    optimizer = optimizers.from_config(config)

    def init() -> TrainState:
        params, aux = task.init(jax.random.key(config.seed))
        return states.create(params, optimizer, aux)

    return task.model, jax.eval_shape(init)


def refuse(mode: str, tokens: float, price: float | None) -> None:
    """Raises ConfigError for what is asked of a plan and a VAE's has not."""
    for flag, given in (("mode", mode != "train"), ("tokens", tokens), ("price", price is not None)):
        if given:
            raise ConfigError(f"--{flag}: a plan of task=vae has facts of its training step only; leave it out")
