"""The weights that training starts from, `config.model.weights`, and a run's weights with those that it left frozen."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import weights
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.interop import stream
from vidgen.models import architecture, lora
from vidgen.models.architecture import Architecture
from vidgen.training import groups, locations
from vidgen.training.checkpoint import Checkpoints, read_config

KIND = "denoiser"
READ = ("ema", "facts")  # of a checkpoint, what its averaged weights are read from


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Weights on disk that fit the denoiser of a config; nothing of them has been read yet.

    Attributes:
      where: the directory.
      dtypes: {path: dtype on disk} of the parameters that they have; the rest, a text encoder of bytes at most, starts
        from nothing.
    """

    where: str
    dtypes: Mapping[str, str]
    _digest: Callable[[], str]
    _load: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def paths(self) -> frozenset[str]:
        """Of the parameters that they have."""
        return frozenset(self.dtypes)

    @functools.cached_property
    def digest(self) -> str:
        """Tells them from others: of a weights directory a hash over all arrays, of a run one over its settings, the
        step and its facts.
        """
        return self._digest()

    def load(self, like: Mapping[str, Any]) -> dict[str, jax.Array]:
        """{path: array} of all of them, straight into the shardings and dtypes of `like`, {path: ShapeDtypeStruct}.

        What of `like` they don't have is left out.
        """
        found = self._load(weights.nest({path: x for path, x in like.items() if path in self.dtypes}))
        return weights.flatten(found)


def architecture_of(config: ConfigDict, generator: Generator) -> Architecture:
    """What weights have to be of."""
    geometry = generator.tokenizer.geometry
    width = generator.text.width if generator.text else config.text.width
    return architecture.of(config.model, geometry.patch, geometry.channels, width)


def parameters_like(config: ConfigDict, generator: Generator) -> dict[str, Any]:
    """All parameters of a denoiser, the low-rank updates too, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init(config, generator, jax.random.key(0)))


def init(config: ConfigDict, generator: Generator, key: jax.Array) -> dict[str, Any]:
    """Parameters that start from nothing, f32, with low-rank updates where the config asks for them."""
    params = generator.init(key, generators.example(config))
    return lora.add(jax.random.fold_in(key, 1), params, config.lora) if config.lora.rank else params


def find(config: ConfigDict, generator: Generator) -> Start | None:
    """What `config.model.weights` names: a weights directory of kind "denoiser", an imported pipeline, of which its
    `transformer/` is taken, or a run's workdir, of which the averaged weights of the newest good checkpoint are.

    None where it names nothing. Parameters whose path has a match of one of `config.model.fresh` start from nothing, so
    that a layer can be added or have another size. Raises ConfigError, naming the setting and both values, for weights
    of another architecture, and for arrays that are missing, unexpected or of another shape.
    """
    where = config.model.weights
    if not where:
        return None
    if not os.path.exists(where):
        raise ConfigError(f"config.model.weights={where}: no such directory; expected one of vidgen import, or a run's")
    if locations.is_run(where):
        return _of_run(config, generator, where)
    where = stream.find(where, KIND)
    about = weights.describe(where, KIND)
    try:
        theirs = Architecture.from_dict(about["config"])
    except ConfigError as e:
        raise ConfigError(f"{os.path.join(where, weights.JSON)}: {e}") from None
    _same(architecture_of(config, generator), theirs, where, config)
    stored = _taken(weights.headers(where), config)
    _check_fitting({path: x.shape for path, x in stored.items()}, config, generator, where)
    dtypes = {path: x.dtype for path, x in stored.items()}
    return Start(
        where, dtypes, lambda: weights.digest_of(where), lambda like: stream.load_onto(where, like, partial=True)
    )


def _of_run(config: ConfigDict, generator: Generator, workdir: str) -> Start:
    theirs = read_config(workdir)
    if theirs.task != "denoiser":
        raise ConfigError(f"config.model.weights={workdir}: a run with task={theirs.task}; expected a denoiser's")
    own = generators.from_config(theirs)
    _same(architecture_of(config, generator), architecture_of(theirs, own), workdir, config)
    like = jax.eval_shape(lambda: own.init(jax.random.key(0), generators.example(theirs)))
    found = _taken(weights.flatten(like), config)
    _check_fitting({path: x.shape for path, x in found.items()}, config, generator, workdir)
    step, facts = _newest(workdir)
    about = json.dumps([configs.to_json(theirs), step, facts], sort_keys=True)

    def load(like: dict[str, Any]) -> dict[str, Any]:
        wanted = {path: x.sharding for path, x in weights.flatten(like).items()}
        somewhere = next(iter(wanted.values()))  # what isn't wanted has another shape here, or no place
        whole = NamedSharding(somewhere.mesh, P()) if isinstance(somewhere, NamedSharding) else somewhere
        every = weights.flatten(parameters_like(theirs, own))
        checkpoints = Checkpoints(workdir, read_only=True)
        try:
            places = weights.nest({path: wanted.get(path, whole) for path in every if not lora.is_low_rank(path)})
            params = weights.flatten(averaged(theirs, own, checkpoints, step, places))
            return weights.nest({path: params[path] for path in wanted})
        finally:
            checkpoints.close()

    digest = hashlib.sha256(about.encode()).hexdigest()[:16]
    return Start(workdir, dict.fromkeys(found, "float32"), lambda: digest, load)


def _newest(workdir: str) -> tuple[int, dict[str, Any]]:
    """(step, facts) of the newest good checkpoint."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = newest(checkpoints)
        return step, checkpoints.facts(step)
    finally:
        checkpoints.close()


def newest(checkpoints: Checkpoints) -> int:
    """The newest checkpoint whose averaged weights are good; raises ConfigError where there is none."""
    step = checkpoints.newest_good(items=READ)
    if step is None:
        raise ConfigError(f"{checkpoints.where}: no finished checkpoint yet; train first, or wait for the first")
    return step


def _taken(found: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    """What was found without that which `config.model.fresh` has start from nothing; raises ConfigError for a pattern
    that is none.
    """
    return {path: x for path, x in found.items() if not _fresh(path, config)}


def _fresh(path: str, config: ConfigDict) -> bool:
    for pattern in config.model.fresh:
        try:
            if re.search(pattern, path):
                return True
        except re.error as e:
            raise ConfigError(f"config.model.fresh: {pattern!r} is no regular expression ({e})") from None
    return False


def _same(ours: Architecture, theirs: Architecture, where: str, config: ConfigDict) -> None:
    if config.model.fresh:  # layers that are new, or of other sizes, are then told by their names
        theirs = theirs.with_doors_of(ours)
    if found := architecture.difference(ours, theirs):
        name, mine, other = found
        raise ConfigError(
            f"config.{name}={mine}: the weights in {where} are of {name}={other}; set that, or take other weights"
        )


def _check_fitting(found: Mapping[str, tuple[int, ...]], config: ConfigDict, generator: Generator, where: str) -> None:
    """Raises ConfigError unless what was found, {path: shape}, is the denoiser's."""
    like = jax.eval_shape(lambda: generator.init(jax.random.key(0), generators.example(config)))
    wanted = {path: tuple(x.shape) for path, x in weights.flatten(like).items()}
    if odd := sorted(found.keys() - wanted.keys()):
        raise ConfigError(f"{where}: array {odd[0]} is no part of the model that the config describes")
    left = wanted.keys() - found.keys()
    missing = sorted(path for path in left if not path.startswith("text/") and not _fresh(path, config))
    if missing:
        raise ConfigError(
            f"{where}: no array {missing[0]} of shape {list(wanted[missing[0]])}, of {len(wanted)}; config.model.fresh "
            "may name what is to start from nothing"
        )
    for path, shape in found.items():
        if tuple(shape) != wanted[path]:
            raise ConfigError(
                f"{where}: {path} has shape {list(shape)}; expected {list(wanted[path])} by the config; "
                "config.model.fresh may name what is to start from nothing"
            )


def averaged(config: ConfigDict, generator: Generator, checkpoints: Checkpoints, step: int, places: Any) -> Any:
    """All weights that a run samples with, of a checkpoint: the averaged ones with those that it left frozen, low-rank
    updates merged into their matrices.

    Args:
      config: the run's.
      generator: of it.
      places: a sharding for each parameter of the generator, a tree or one for all.

    Raises ConfigError where `config.model.weights`, which frozen ones are read from, aren't those of the run.
    """
    like = parameters_like(config, generator)
    part, start = partition(config, generator, like)
    like = placed(like, places)
    trained, frozen = part.split(like)
    params = checkpoints.restore_ema(step, trained)
    if frozen:
        check_digest(config, start, checkpoints.facts(step))
        params = groups.join(params, part.split(weights.nest(start.load(weights.flatten(like))))[1])
    if config.lora.rank:
        base = weights.flatten(jax.tree.map(lambda x: x.sharding, like))
        base = weights.nest({path: sharding for path, sharding in base.items() if not lora.is_low_rank(path)})
        params = jax.jit(lambda p: lora.merged(p, lora.scale(config.lora)), out_shardings=base)(params)
    return params


def placed(like: Any, places: Any) -> dict[str, Any]:
    """ShapeDtypeStructs with the shardings of `places`, a tree or one for all; a low-rank update that isn't in the tree
    lies whole on the devices of its matrix.
    """
    flat = weights.flatten(like)
    spread = weights.flatten(places) if isinstance(places, Mapping) else dict.fromkeys(flat, places)

    def of(path: str) -> Any:
        if path in spread:
            return spread[path]
        beside = spread[f"{path.rpartition('/')[0]}/kernel"]
        return NamedSharding(beside.mesh, P()) if isinstance(beside, NamedSharding) else beside

    return weights.nest({path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of(path)) for path, x in flat.items()})


def partition(config: ConfigDict, generator: Generator, like: Any) -> tuple[groups.Partition, Start | None]:
    """(the groups of a denoiser's parameters, what the frozen ones are read from); raises ConfigError."""
    start = find(config, generator) if groups.freezes(config) else None
    return groups.partition(config, like, start.paths if start else ()), start


def check_digest(config: ConfigDict, start: Start | None, facts: Mapping[str, Any]) -> None:
    """Raises ConfigError if a checkpoint's facts name other weights that training started from."""
    now, then = start.digest if start else "", facts.get("weights", "")
    if now != then:
        raise ConfigError(
            f"config.model.weights={config.model.weights}: weights {now or 'none'}, but the checkpoint started from "
            f"{then or 'none'}; put those back there"
        )
