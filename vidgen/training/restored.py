"""A run's workdir, or an imported pipeline, as what clips are drawn from: its config, its generator and its weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.interop import pipelines, stream
from vidgen.models import lora
from vidgen.parallel.mesh import make_mesh
from vidgen.parallel.rules import rules_of, tree_shardings
from vidgen.training import start
from vidgen.training.checkpoint import Checkpoints, read_config
from vidgen.weights import flatten, nest

# What of a run's settings is of the machine that it trained on.
HERE = {
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.context": 1,
    "mesh.tensor": 1,
    "mesh.slices": 1,
    "mesh.attention": "auto",
    "mesh.ulysses": 0,
    "model.attention": "auto",
}


def load(workdir: str, step: int | None = None) -> tuple[ConfigDict, Generator, Any, int]:
    """(config, generator, averaged weights, step) of a checkpoint of `workdir`, the newest unless told; ConfigError.

    Of an imported pipeline its own weights, in the dtypes they are stored in where `config.dtype` is bfloat16; step 0.
    With `config.sample.expert` the weights are `Experts`. Whatever mesh was trained on, weights lie in pieces over all
    devices here, and so does the generator's work.
    """
    config = run_config(workdir)
    devices = len(jax.devices())
    mesh = make_mesh(config.mesh, devices, config.rows.tokens) if devices > 1 else None
    generator = generators.from_config(config, mesh)
    like = jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(config)))
    one = SingleDeviceSharding(jax.devices()[0])
    places = tree_shardings(like, mesh, rules_of(config.mesh)) if mesh else jax.tree.map(lambda _: one, like)
    if pipelines.is_imported(workdir):
        if step:
            raise ConfigError(
                f"--step={step}: {workdir} is an imported pipeline, which has no checkpoints; leave it out"
            )
        params = _imported(config, config.model.weights, places)
        return config, generator, with_expert(config, generator, params), 0
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = chosen_step(workdir, checkpoints, step)
        facts = checkpoints.facts(step)
        check_tokenizer(generator.tokenizer.digest, facts, config.tokenizer.weights)
        check_text(generator.text.digest if generator.text else "", facts, config.text.weights)
        params = start.averaged(config, generator, checkpoints, step, places)
        return config, generator, with_expert(config, generator, params), step
    finally:
        checkpoints.close()


def run_config(workdir: str) -> ConfigDict:
    """The config of a denoiser's run, or of an imported pipeline, for the devices that are here; raises ConfigError."""
    if pipelines.is_imported(workdir):
        return configs.override(pipelines.read_config(workdir), HERE)
    config = configs.override(read_config(workdir), HERE)
    if config.task != "denoiser":
        raise ConfigError(
            f"{workdir}: a run with task={config.task}, which draws nothing from prompts; expected a denoiser's, or "
            "for this one: vidgen evaluate --suite reconstruction"
        )
    return config


def chosen_step(workdir: str, checkpoints: Checkpoints, step: int | None) -> int:
    """`step`, or that of the newest checkpoint whose averaged weights are good; raises ConfigError where there is none,
    and for a `step` that is damaged.
    """
    found = checkpoints.steps
    if step is None:
        return start.newest(checkpoints)
    if step not in found:
        told = f"there are {', '.join(map(str, found))}" if found else "there are none yet"
        raise ConfigError(f"{checkpoints.where}: no step {step}; {told}")
    if damage := checkpoints.damage(step, start.READ):
        raise ConfigError(f"{checkpoints.where}/{step}/{damage}; take another --step, or none for the newest good one")
    return step


def expert(config: ConfigDict, generator: Generator) -> start.Start | None:
    """The weights that `config.sample.expert` names: of a weights directory, an imported pipeline or a run.

    None where it names none. Raises ConfigError for what can't take turns with the denoiser of the config.
    """
    s = config.sample
    if not s.expert:
        return None
    if not 0 < s.boundary < 1:
        raise ConfigError(
            f"config.sample.boundary={s.boundary}: with config.sample.expert, expected a number within 0 to 1"
        )
    try:
        return start.find(configs.override(config, {"model.weights": s.expert}), generator)
    except ConfigError as e:
        raise ConfigError(f"config.sample.expert={s.expert}: {e}") from None


def with_expert(config: ConfigDict, generator: Generator, params: Any) -> Any:
    """`params` with those of `config.sample.expert`, laid out alike, as `Experts`; as they are where it names none.

    The one of the two that trained at low noise, by `config.objective.time_range`, is the one for low noise; where
    that doesn't say, `config.sample.expert` is. Raises ConfigError.
    """
    found = expert(config, generator)
    if found is None:
        return params
    like = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for path, x in flatten(params).items()
        if not lora.is_low_rank(path)  # which the other one doesn't have
    }
    if missing := sorted(like.keys() - found.paths):
        raise ConfigError(f"config.sample.expert={config.sample.expert}: no array {missing[0]} in it")
    other, boundary = nest(found.load(like)), config.sample.boundary
    if config.objective.time_range[1] <= boundary:
        return generators.Experts(high=other, low=params, boundary=boundary)
    return generators.Experts(high=params, low=other, boundary=boundary)


def _imported(config: ConfigDict, directory: str, places: Any) -> Any:
    """Weights as they are stored, where that is enough for the config's dtype."""
    return stream.load_onto(directory, places, jnp.float32 if config.dtype == "float32" else None)


def check_tokenizer(digest: str, facts: dict[str, Any], weights: str) -> None:
    """Raises ConfigError if `facts` of a checkpoint name another VAE than `digest`, the one at `weights` now."""
    trained = facts.get("tokenizer", digest)
    if trained != digest:
        raise ConfigError(
            f"config.tokenizer.weights={weights}: VAE {digest or 'none'}, but the checkpoint was trained on latents "
            f"of {trained or 'none'}; put that one's weights back there"
        )


def check_text(digest: str, facts: dict[str, Any], weights: str) -> None:
    """Raises ConfigError if `facts` of a checkpoint name another text encoder than `digest`, that of `weights` now."""
    if (trained := facts.get("text", digest)) != digest:
        raise ConfigError(
            f"config.text.weights={weights}: text encoder {digest or 'none'}, but the checkpoint was trained with "
            f"{trained or 'none'}; put that one's weights back there"
        )
