"""Whole pipelines of diffusers in and out, and the run config that samples and fine-tunes one.

OUT/pipeline.json    {"format", "index": model_index.json as it stood, "parts": {name: kind or "copied"}, "reason"}
OUT/config.json      a run's settings, so that OUT is a workdir to `vidgen sample`; absent where "reason" says why
OUT/transformer, …   a weights directory each (transformer, transformer_2, vae, text_encoder)
OUT/tokenizer, …     what is no network of vidgen's, copied as it is (scheduler, tokenizer, image_encoder)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import weights
from vidgen.config import ConfigError
from vidgen.geometry import Geometry
from vidgen.interop import arrays as arrays_on_disk
from vidgen.interop import checkpoint, diffusers
from vidgen.interop.arrays import Arrays
from vidgen.interop.stream import PIPELINE

COPIED = "copied"
TEXT = 512  # places that Wan's pipelines fill each prompt up to
SCHEDULER = os.path.join("scheduler", "scheduler_config.json")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a pipeline that was read or written.

    kind: of its weights directory, or COPIED.
    cls: its class in diffusers or transformers.
    parameters: numbers.
    dtypes: {tensor: dtype in diffusers' files}.
    nbytes: written.
    digest: of the weights; empty where they were copied.
    """

    kind: str
    cls: str
    parameters: int
    dtypes: Mapping[str, str]
    nbytes: int
    digest: str


def is_pipeline(directory: str) -> bool:
    """Whether a directory is a whole pipeline of diffusers."""
    there = os.path.isfile(os.path.join(directory, checkpoint.PIPELINE))
    return there and not os.path.isfile(os.path.join(directory, checkpoint.CONFIG))


def is_imported(directory: str) -> bool:
    """Whether a directory is what `store` wrote."""
    return os.path.isfile(os.path.join(directory, PIPELINE))


def read_index(directory: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(model_index.json, {part: its class}) of a pipeline; raises ConfigError, also for a part that isn't there."""
    path = os.path.join(directory, checkpoint.PIPELINE)
    index = checkpoint.read_json(path, "a pipeline of diffusers")
    parts = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise ConfigError(f"{path}: part {name!r}: expected the name of a directory")
            if not os.path.isdir(os.path.join(directory, name)):
                raise ConfigError(
                    f"{path}: {name} ({value[1]}) is not there: no directory {os.path.join(directory, name)}; fetch "
                    "the whole pipeline, or import one part's directory"
                )
            parts[name] = value[1]
    if not parts:
        raise ConfigError(f'{path}: names no part of a pipeline, such as "vae": ["diffusers", "AutoencoderKLWan"]')
    return index, parts


def size(directory: str) -> int:
    """Bytes of all files below."""
    return sum(os.path.getsize(os.path.join(root, f)) for root, _, files in os.walk(directory) for f in files)


def store(source: str, made: str, output: str) -> Iterator[tuple[str, Part]]:
    """Fills the directory `made`, which is to be `output`, with the pipeline in `source`, part by part.

    Yields (name, what was written). Raises ConfigError.
    """
    index, parts = read_index(source)
    models = {}
    for name, cls in parts.items():
        if cls not in diffusers.CLASSES:
            continue
        models[name] = diffusers.read(os.path.join(source, name))  # all headers, before anything is written
        if models[name].name != cls:
            raise ConfigError(f"{source}: {name}/ is of {models[name].name}, model_index.json says {cls}")
    for name, cls in parts.items():
        target = os.path.join(made, name)
        if name not in models:
            shutil.copytree(os.path.join(source, name), target)
            yield name, Part(COPIED, cls, 0, {}, size(target), "")
            continue
        model = models[name]
        os.mkdir(target)
        digest = diffusers.store(model, target)
        yield name, Part(model.kind, cls, model.arrays.parameters, model.dtypes, model.arrays.nbytes, digest)
    kinds = {name: models[name].kind if name in models else COPIED for name in parts}
    about = {"format": "diffusers", "index": index, "parts": kinds}
    try:
        config = rooted(run_config(source, index, parts, models), os.path.abspath(output), kinds)
        with open(os.path.join(made, checkpoint.CONFIG), "w", encoding="utf-8") as f:
            f.write(configs.to_json(config) + "\n")
    except ConfigError as e:
        about["reason"] = str(e)
    with open(os.path.join(made, PIPELINE), "w", encoding="utf-8") as f:
        json.dump(about, f, indent=2)


def describe(directory: str) -> dict[str, Any]:
    """pipeline.json of an imported pipeline; raises ConfigError."""
    path = os.path.join(directory, PIPELINE)
    about = checkpoint.read_json(path, "what `vidgen import` writes")
    parts, index = about.get("parts"), about.get("index")
    if not isinstance(parts, dict) or not isinstance(index, dict):
        raise ConfigError(f"{path}: not what `vidgen import` writes; import the pipeline anew")
    for name in parts:
        odd = os.path.basename(name) != name or name in ("", ".", "..")
        if odd or not os.path.isdir(os.path.join(directory, name)):
            raise ConfigError(f"{path}: {name} ({parts[name]}) is not there; import the pipeline anew")
    return about


def read_config(directory: str) -> ConfigDict:
    """The run config of an imported pipeline, with the paths of where it lies now; raises ConfigError."""
    about = describe(directory)
    if "reason" in about:
        raise ConfigError(f"{directory}: this pipeline can be exported, not run: {about['reason']}")
    path = os.path.join(directory, checkpoint.CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            config = configs.from_json(f.read())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: {e}; expected what `vidgen import` writes") from None
    return rooted(config, os.path.abspath(directory), about["parts"])


def rooted(config: ConfigDict, directory: str, parts: Mapping[str, str]) -> ConfigDict:
    """A copy of a pipeline's run config with the paths of its parts in `directory`."""
    config = ConfigDict(config)
    config.model.weights = os.path.join(directory, "transformer")
    config.tokenizer.weights = os.path.join(directory, "vae")
    config.text.weights = os.path.join(directory, "text_encoder")
    config.sample.expert = os.path.join(directory, "transformer_2") if "transformer_2" in parts else ""
    return config


def write(
    directory: str, made: str, instead: Mapping[str, tuple[dict[str, Any], Arrays]]
) -> Iterator[tuple[str, Part]]:
    """Fills the directory `made` with an imported pipeline as diffusers reads it, part by part.

    Args:
      directory: the imported pipeline.
      made: to fill.
      instead: {part: (config of a weights directory, its arrays)} to be written in its place, in its files and dtypes.

    Yields (name, what was written). Raises ConfigError.
    """
    about = describe(directory)
    for name, kind in about["parts"].items():
        source, target = os.path.join(directory, name), os.path.join(made, name)
        cls = about["index"].get(name, ["", ""])[1]
        if kind == COPIED:
            shutil.copytree(source, target)
            yield name, Part(COPIED, cls, 0, {}, size(target), "")
            continue
        os.mkdir(target)
        if name in instead:
            config, arrays = instead[name]
            digest, facts = "", source
        else:
            config, arrays = weights.describe(source, kind)["config"], arrays_on_disk.of_weights(source)
            digest = weights.digest_of(source)
            facts = source if diffusers.kept(source, digest) else ""
        written = diffusers.write(target, kind, config, arrays, facts)
        yield name, Part(kind, written.name, arrays.parameters, written.dtypes, written.nbytes, digest)
    with open(os.path.join(made, checkpoint.PIPELINE), "w", encoding="utf-8") as f:
        json.dump(about["index"], f, indent=2)
        f.write("\n")


def run_config(
    source: str, index: Mapping[str, Any], parts: Mapping[str, str], models: Mapping[str, diffusers.Model]
) -> ConfigDict:
    """The settings with which a pipeline is sampled from, and fine-tuned, as its own code has them.

    Raises ConfigError for a pipeline that vidgen has no such for: other networks, another scheduler.
    """
    wanted = {"transformer": ("denoiser",), "vae": ("vae",), "text_encoder": ("t5", "umt5")}
    for name, kinds in wanted.items():
        if name not in models or models[name].kind not in kinds:
            known = [cls for cls, row in diffusers.CLASSES.items() if row.kind in kinds]
            raise ConfigError(f"its {name} is {parts.get(name, 'not there')}; expected {' or '.join(known)}")
    denoiser, vae, text = (models[name] for name in wanted)
    c = configs.base()
    c.model.update(denoiser.config.to_model())
    c.tokenizer.update({"name": "vae", "stride": (), "patch": denoiser.config.patch})
    c.text.update({"name": text.kind, "pad": TEXT, "width": text.config.width})
    c.objective.update({"prediction": "velocity", "loss": "velocity"})
    c.sample.solver, c.objective.shift = scheduler(source)
    c.rows.update({"caption": TEXT, "text": TEXT, "count": 1, "segments": 1})
    if channels := denoiser.config["cond"]:
        own = vae.config.stride[0] + denoiser.config.channels  # the mask of each frame, and latents
        if channels != own * math.prod(denoiser.config.patch):
            raise ConfigError(f"its transformer has {channels} numbers a token beside the noisy ones; expected Wan's")
        c.control.channels = "wan"  # and no masks: the channels say themselves what is given
    # As Wan's pipelines are called where nobody says otherwise, by their model cards.
    tokens_of_frames = bool(index.get("expand_timesteps"))
    second = models.get("transformer_2")
    if tokens_of_frames:
        c.sample.update({"frames": 121, "height": 704, "width": 1280, "fps": 24.0, "steps": 50, "guidance": 5.0})
        c.control.masks = (("first", 0.5),)
    else:
        c.sample.update({"frames": 81, "height": 480, "width": 832, "fps": 16.0, "steps": 50, "guidance": 5.0})
    if second is not None:
        boundary = index.get("boundary_ratio")
        if type(boundary) not in (int, float) or not 0 < boundary < 1:
            raise ConfigError(
                f"it has a transformer_2, and boundary_ratio={boundary!r}; expected a number within 0 to 1"
            )
        if second.config != denoiser.config:
            raise ConfigError("its transformer_2 is of another architecture than its transformer; expected the same")
        more = {"guidance": 3.5} if channels else {"guidance": 4.0, "guidance_2": 3.0}
        c.sample.update({"boundary": float(boundary), "steps": 40, **more})
    geometry = Geometry(vae.config.stride, denoiser.config.patch, vae.config.z_dim)
    if vae.config.z_dim != denoiser.config.channels:
        raise ConfigError(
            f"its vae makes {vae.config.z_dim} channels, its transformer takes {denoiser.config.channels}"
        )
    tokens = geometry.tokens(*geometry.cover(c.sample.frames, c.sample.height, c.sample.width))
    c.rows.tokens = -(-tokens // 128) * 128
    return c


def scheduler(source: str) -> tuple[str, float]:
    """(solver, shift) of a pipeline's scheduler; raises ConfigError for one that does something else."""
    path = os.path.join(source, SCHEDULER)
    c = checkpoint.read_json(path, "the settings of a scheduler")
    name = c.get("_class_name")
    if name == "UniPCMultistepScheduler":
        wanted = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "num_train_timesteps": 1000,
            "disable_corrector": [],
            "thresholding": False,
            "solver_p": None,
        }
        defaults = wanted | {"prediction_type": "epsilon", "use_flow_sigmas": False}
        solver, shift = "unipc", c.get("flow_shift", 1.0)
    elif name == "FlowMatchEulerDiscreteScheduler":
        wanted = {"num_train_timesteps": 1000, "invert_sigmas": False, "stochastic_sampling": False}
        defaults, solver, shift = wanted, "flow_match_euler", c.get("shift", 1.0)
    else:
        raise ConfigError(
            f"its scheduler is {name}; expected UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
        )
    curves = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")
    wanted |= dict.fromkeys(curves, False) | {"shift_terminal": None}
    defaults = dict.fromkeys(curves, False) | {"shift_terminal": None} | defaults
    for key, value in wanted.items():
        found = c.get(key, defaults[key])
        if found != value and (found or value):
            raise ConfigError(f"{SCHEDULER}: {key}={found!r} is not implemented; expected {value!r}")
    if type(shift) not in (int, float) or not shift > 0:
        raise ConfigError(f"{SCHEDULER}: a shift of {shift!r}; expected a number above 0")
    return solver, float(shift)
