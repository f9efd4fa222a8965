"""`vidgen export`: weights of a run, a weights directory or an imported pipeline, as another project reads them."""

from __future__ import annotations

import os
import shutil
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.import_weights import Result, dtypes, of_parts
from vidgen.interop import arrays as arrays_on_disk
from vidgen.interop import checkpoint, diffusers, lora, pipelines, stream
from vidgen.interop.arrays import Arrays
from vidgen.models.architecture import Architecture
from vidgen.training import restored, start
from vidgen.training.checkpoint import Checkpoints

FORMATS = ("diffusers", "vidgen")


def run(source: str, output: str, *, format: str = "diffusers", merge: bool = False, step: int | None = None) -> Result:
    """Writes the weights of `source` to the new directory `output`.

    Args:
      source: a weights directory; a workdir that has one in `weights/` (a VAE's moving average); an imported pipeline;
        or the workdir of a denoiser, whose averaged weights are taken.
      output: must not be there, or be empty.
      format: "diffusers": what `from_pretrained` reads. What was imported comes out bit for bit. Of a run that started
        from an imported pipeline, the pipeline is written with the run's weights in place of those it started from, in
        the same files and dtypes, rounded where those are 16 bits; of a run with `config.lora.rank`, the low-rank
        updates alone, for `load_lora_weights`. All else is written in the arrays' own dtypes, a run's in float32.
        "vidgen": a weights directory.
      merge: adds low-rank updates to their matrices, and writes those.
      step: of the denoiser's checkpoint; None: the newest.

    Raises ConfigError; `output` is then not there.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: known are {', '.join(FORMATS)}")
    if os.path.isdir(os.path.join(source, "checkpoints")) and not os.path.isdir(os.path.join(source, "weights")):
        return _run(source, output, format, merge, step)
    if merge or step is not None:
        flag = "--merge" if merge else f"--step={step}"
        raise ConfigError(f"{flag}: {source} is no workdir of a denoiser; leave it out")
    if pipelines.is_imported(source):
        return _pipeline(source, output, format, {})
    directory = weights.find(source)
    about, digest = weights.describe(directory), weights.digest_of(directory)
    arrays = arrays_on_disk.of_weights(directory)
    if format == "vidgen":
        with checkpoint.new_directory(output, arrays.nbytes) as made:
            for file in (weights.JSON, weights.TENSORS, diffusers.SOURCE):
                if os.path.exists(path := os.path.join(directory, file)):
                    shutil.copyfile(path, os.path.join(made, file))
        stored = {path: dtype for path, (_, dtype) in arrays.specs.items()}
        result = Result(output, about["kind"], arrays.parameters, dtypes(stored), arrays.nbytes / 2**30, digest)
    else:
        with checkpoint.new_directory(output, arrays.nbytes) as made:
            facts = directory if diffusers.kept(directory, digest) else ""
            written = diffusers.write(made, about["kind"], about["config"], arrays, facts)
        result = _result(output, arrays, written, digest)
    return _said(f"{directory}: weights of kind {about['kind']}, digest {digest}", result)


def _pipeline(
    source: str, output: str, format: str, instead: dict[str, tuple[dict[str, Any], Arrays]], said: str = ""
) -> Result:
    if format == "vidgen":
        raise ConfigError(f"--format=vidgen: {source} is an imported pipeline; copy it, or export one part's directory")
    index = pipelines.describe(source)["index"]
    with checkpoint.new_directory(output, pipelines.size(source)) as made:
        parts = dict(pipelines.write(source, made, instead))
    return _said(said or source, of_parts(output, index.get("_class_name", "pipeline"), parts))


def _run(workdir: str, output: str, format: str, merge: bool, step: int | None) -> Result:
    """Exports the averaged weights of a denoiser's run."""
    config = restored.run_config(workdir)
    generator = generators.from_config(config)
    if merge and not config.lora.rank:
        raise ConfigError(f"--merge: {workdir} has config.lora.rank=0, so there is nothing to merge; leave it out")
    checkpoint.check_new(output)  # before the work
    architecture, place = start.architecture_of(config, generator), SingleDeviceSharding(_host())
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = restored.chosen_step(workdir, checkpoints, step)
        said = f"{workdir}: averaged weights of step {step}"
        if config.lora.rank and format == "diffusers" and not merge:
            with checkpoint.new_directory(output) as made:
                like = start.placed(start.parameters_like(config, generator), place)
                trained = start.partition(config, generator, like)[0].split(like)[0]
                params = jax.tree.map(np.asarray, checkpoints.restore_ema(step, trained))
                return _said(said, _low_rank(made, output, params, architecture, config))
        params = start.averaged(config, generator, checkpoints, step, place)
    finally:
        checkpoints.close()
    flat = {path: np.asarray(array) for path, array in weights.flatten(params).items()}
    arrays, about = arrays_on_disk.of_flat(flat, workdir), architecture.to_dict()
    source = _started_from(config)
    if format == "diffusers" and pipelines.is_imported(os.path.dirname(source)):
        root, part = os.path.split(source)
        return _pipeline(root, output, format, {part: (about, arrays)}, said)
    with checkpoint.new_directory(output, arrays.nbytes) as made:
        if format == "vidgen":
            digest = weights.stream(made, start.KIND, about, arrays.specs, arrays.read)
            stored = {path: dtype for path, (_, dtype) in arrays.specs.items()}
            result = Result(output, start.KIND, arrays.parameters, dtypes(stored), arrays.nbytes / 2**30, digest)
        else:
            facts = source if os.path.exists(os.path.join(source, diffusers.SOURCE)) else ""
            result = _result(output, arrays, diffusers.write(made, start.KIND, about, arrays, facts), "")
    return _said(said, result)


def _low_rank(made: str, output: str, params: Any, architecture: Architecture, config: ConfigDict) -> Result:
    written = lora.write(made, params, architecture, config.lora)
    size = sum(array.nbytes for array in written.values())
    stored = {key: str(array.dtype) for key, array in written.items()}
    return Result(output, "LoRA", sum(array.size for array in written.values()), dtypes(stored), size / 2**30, "")


def _started_from(config: ConfigDict) -> str:
    """The weights directory that a run started from; empty if from none, or if it isn't there any more."""
    if not config.model.weights or not os.path.isdir(config.model.weights):
        return ""
    if os.path.isdir(os.path.join(config.model.weights, "checkpoints")):
        return ""  # another run's
    return os.path.abspath(stream.find(config.model.weights))


def _host() -> jax.Device:
    """The host's own memory, where JAX has a backend for it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _result(output: str, arrays: Arrays, written: diffusers.Written, digest: str) -> Result:
    return Result(output, written.name, arrays.parameters, dtypes(written.dtypes), written.nbytes / 2**30, digest)


def _said(what: str, result: Result) -> Result:
    print(
        f"{what}\n{result.output}: {result.name}, {result.parameters:,} parameters in {result.dtype}, "
        f"{result.gib:.3g} GiB",
        flush=True,
    )
    return result
