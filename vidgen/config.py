"""Every setting of a run, with its default and its meaning: the one place where a key is made.

A config file in `configs/` starts from `base()` and changes what it wants. The tree is locked, so a key that is
not here is an error that names the nearest one. What numbers may be stands in `ranges.py`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vidgen import secrets
from vidgen.ranges import RANGES


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


def base() -> ConfigDict:
    """All settings at their defaults."""
    c = ConfigDict()
    c.seed = 0
    c.task = "denoiser"  # what is trained: denoiser (objective.*, on packed rows) | vae (reconstruction.*, on clips.*)
    c.dtype = "bfloat16"  # of matrix products: bfloat16 | float32; master weights and all norms are float32

    c.data = data = ConfigDict()
    data.source = "moving_shapes"  # moving_shapes | a directory of shards | tfds:NAME[/CONFIG][:VERSION]
    data.holdout = 0.0  # share of the clips (by a hash of their file) kept out of training for the held-out loss
    data.video_feature = ""  # of a TFDS data source; empty: found by its name and type
    data.text_feature = ""
    data.fps = 0.0  # of a TFDS data source of decoded frames, which do not say; 0: 24
    data.threads = 2  # that read and decode
    data.prefetch = 4  # batches ready ahead of the step
    data.latents = ""  # directory of `vidgen encode`; empty: a vae encodes while it trains

    # What the procedural set shows; see vidgen/data/moving_shapes.py.
    data.moving_shapes = shapes = ConfigDict()
    shapes.level = "full"  # easy (one object, three shapes, six colours, four directions, black ground) | full
    shapes.clips = 1_000_000  # clips in a pass; every pass shows new ones
    shapes.sizes = ((17, 32, 32),)  # (frames, height, width) a clip may have, drawn alike
    shapes.fps = 8.0
    shapes.languages = ("en",)  # en, zh
    shapes.heldout = 0.2  # share of the combinations of shape, colour and motion that are never trained on

    c.rows = rows = ConfigDict()
    rows.count = 8  # B, rows a step, over all devices
    rows.tokens = 1024  # S, video tokens a row
    rows.segments = 16  # K, clips a row at most
    rows.text = 512  # L, text tokens a row
    rows.caption = 256  # text tokens a caption at most; longer ones are cut, and counted
    rows.window = 4096  # clips that are packed together, at least

    c.tokenizer = tokenizer = ConfigDict()
    tokenizer.name = "patch"  # patch | wavelet | vae
    tokenizer.weights = ""  # of a vae: a workdir that trained one, or a directory of `vidgen import`
    tokenizer.stride = (4, 8, 8)  # pixels a latent covers in (t, y, x); wavelet: powers of two; vae: its own, or ()
    tokenizer.patch = (1, 1, 1)  # latents a token covers in (t, y, x)
    tokenizer.mean = 0.0  # of the latents, for pixels in [-1, 1]; a vae has its own, a channel each
    tokenizer.std = 0.5

    # The causal video VAE that task=vae trains; see vidgen/tokenizers/vae.py. The defaults are Wan 2.1's.
    c.vae = vae = ConfigDict()
    vae.base_dim = 96  # width of the encoder's first level; level i is dim_mult[i] times as wide
    vae.decoder_base_dim = 0  # of the decoder's last level; 0: base_dim
    vae.dim_mult = (1, 2, 4, 4)  # each level but the last halves height and width
    vae.temporal_downsample = (False, True, True)  # which of them halve the frames as well
    vae.num_res_blocks = 2  # residual blocks a level; the decoder has one more
    vae.z_dim = 16  # channels of a latent
    vae.residual = False  # Wan 2.2: parameter-free shortcuts around the levels
    vae.patch = 1  # pixels that are folded into channels first, in y and x; Wan 2.2: 2
    vae.remat = True  # blocks are computed again in the backward pass

    # What the VAE learns from: chunks cut out of the clips at random, of one of these sizes a step.
    c.clips = clips = ConfigDict()
    clips.shapes = ((1, 64, 64, 16), (9, 64, 64, 4), (17, 64, 64, 2))  # (frames, height, width, chunks a step)
    clips.weights = ()  # how often each is drawn, after the images; empty: alike
    clips.image_steps = 0  # steps at the start that see shapes of one frame only

    # What the VAE's step minimises; see vidgen/objectives/reconstruction.py.
    c.reconstruction = reconstruction = ConfigDict()
    reconstruction.l1 = 1.0  # weight of the mean absolute error of pixels in [-1, 1]
    reconstruction.l2 = 0.0  # of the mean squared error, which sees small bright things on a plain ground sooner
    reconstruction.kl = 1e-6  # of the KL divergence to a standard normal, a latent value
    reconstruction.lpips = 0.0  # of LPIPS (VGG16); needs the extra [perceptual]
    reconstruction.lpips_frames = 4  # frames of a chunk that LPIPS and the image critic see, drawn each step; 0: all
    reconstruction.gan = 0.0  # of the critics, times the adaptive weight; 0: no critics
    reconstruction.gan_start = 0  # steps before the critics join
    reconstruction.gan_dim = 64  # width of the critics' first layer
    reconstruction.gan_layers = 3  # of stride 2
    reconstruction.gan_video = True  # a critic of clips beside the one of frames

    c.text = text = ConfigDict()
    text.name = "bytes"  # bytes: small, trained with the denoiser | t5 | umt5: frozen, from text.weights
    text.weights = ""  # of t5 and umt5: a directory of `vidgen import`, with the tokenizer's files beside it
    text.pad = 0  # places of a row that each caption fills, zeros behind its end, which are attended to (Wan); 0: none
    text.width = 256  # E; t5 and umt5 have their own
    text.layers = 2
    text.heads = 4

    c.model = model = ConfigDict()
    model.backbone = "dit"  # dit | uvit: see vidgen/models/
    model.weights = ""  # training starts from these: a directory of `vidgen import`, or a run's; empty: from nothing
    model.fresh = ()  # regexes of parameters that start from nothing all the same: a head of another size, say
    model.width = 384
    model.layers = 12
    model.heads = 6
    model.mlp_ratio = 4.0
    model.mlp_dim = 0  # hidden width of the MLP; 0: mlp_ratio · width
    model.mlp_eps = 1e-6  # of the norm before the MLP (diffusers' DiT: 1e-5); all other norms of tokens have 1e-6
    model.bias = False  # of attention's projections
    model.qk_norm = "head"  # RMS norm of queries and keys: head (each alone) | joint (all heads together) | none
    model.rope = True  # whether queries and keys are turned by where they are
    model.rope_pairs = ()  # turned pairs of a head along (t, y, x); empty: a third each
    model.rope_theta = 100.0  # of the 3D rotary embedding; coordinates are small numbers
    model.level_theta = 10_000.0  # the longest wavelength that noise levels, times 1000, are told in, over 2π
    model.absolute = "projected"  # where tokens are, beside how far apart: projected | sincos (DiT's) | table | none
    model.table = ()  # (t, y, x) tokens of the largest clip, of absolute="table" and "sincos"
    model.cross = True  # blocks attend to the text
    model.cross_norm = False  # tokens go through a norm with weights before they attend to the text (Wan)
    model.final = "modulation"  # shift and scale before the head: modulation (a layer) | table (adaLN-single's, Wan)
    model.classes = 0  # labels that a clip may have, and one more for none: read from batch.vectors[..., 0]
    model.level_per_block = False  # each block embeds noise levels and labels on its own (diffusers' DiT, untied)
    model.learned_sigma = False  # the head puts out a variance beside the prediction, kept but not trained (DiT)
    model.cond = 0  # numbers a token of batch.cond, channels beside the noisy ones
    model.image_width = 0  # of image features in batch.context["image"], attended beside the text (Wan I2V)
    model.image_tokens = 0  # with learned positions for so many image features (Wan FLF2V); 0: none
    model.shared_modulation = False  # one modulation layer for all blocks (adaLN-single) instead of one each
    model.text_mlp = False  # text goes through two matrices to the model's width before blocks attend to it
    model.time_in_seconds = False  # t coordinates in seconds × 8 instead of latent frames
    model.remat = "full"  # what the backward pass computes again: see vidgen/models/remat.py
    model.residual = "float32"  # dtype of what a block hands to the next: float32 | bfloat16, at half the memory
    model.unroll = 1  # layers unrolled in the scan; all of them is faster on a CPU, one compiles fastest
    model.attention = "auto"  # kernel: auto (what the device does best) | dense | blockwise | splash | cudnn
    model.window = ()  # (t, y, x) in tokens: attention within 3D windows, plain and moved by half in turns
    model.full_every = 4  # with windows: every so-many-th layer attends to the whole clip; 0: none does

    c.objective = objective = ConfigDict()
    objective.prediction = "clean"  # what the network puts out: clean | velocity | noise | v
    objective.loss = "velocity"  # the space the error is measured in: clean | velocity | noise | v
    objective.time_mean = 0.0  # logit-normal noise levels: logit(t) ~ N(mean, std), t = 1 is pure noise
    objective.time_std = 1.0
    objective.time_min = 0.05  # loss weights in 1/t or 1/(1-t) stop growing here
    objective.time_range = (0.0, 1.0)  # noise levels trained at, after the shift: of one expert of several (Wan 2.2)
    objective.shift = 1.0  # of noise levels at `shift_tokens`; grows with sqrt(tokens of the clip / shift_tokens)
    objective.shift_tokens = 0  # 0: the same shift at every size
    objective.caption_dropout = 0.1  # share of clips trained without their caption, for guidance

    # What of a clip may be given, in training and in sampling; see vidgen/conditioning/.
    c.control = control = ConfigDict()
    control.masks = ()  # ((first | first_last | extend, share of the clips trained with that much of them given), …)
    control.channels = "none"  # how the model is told what is given: none (by level 0 alone) | wan (mask and latents)

    # Low-rank updates beside frozen matrices (Hu et al., arXiv:2106.09685); needs model.weights.
    c.lora = lora = ConfigDict()
    lora.rank = 0  # 0: all weights train
    lora.alpha = 0.0  # updates are scaled by alpha / rank; 0: by 1
    lora.targets = r"blocks/.*(attention|cross)/(query|key|value|out)$"  # regex of the layers that have them

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "muon"  # muon: for the matrices inside blocks, AdamW for the rest | adamw | adafactor | galore
    optimizer.groups = ()  # ((path regex, {"lr": factor, "weight_decay": number, "frozen": bool}), …): first match
    optimizer.galore_rank = 0.25  # of galore: share of a matrix's smaller side that Adam's moments are kept in
    optimizer.galore_every = 50  # steps between new projections
    optimizer.galore_scale = 2.0  # of the update
    optimizer.lr = 1e-3  # peak, of AdamW
    optimizer.muon_lr = 0.02  # peak, of Muon
    optimizer.schedule = "cosine"  # cosine | constant | linear | wsd: constant, then a linear fall over the last fifth
    optimizer.warmup = 100  # steps
    optimizer.final = 0.0  # learning rate at the last step, as a share of the peak
    optimizer.beta1 = 0.9  # adafactor: 0 keeps no first moment, and so almost nothing
    optimizer.beta2 = 0.99
    optimizer.momentum = 0.95  # of Muon
    optimizer.weight_decay = 0.0  # of kernels and embeddings; with muon, of its matrices only
    optimizer.clip = 1.0  # global norm of the gradient; 0: none
    optimizer.outlier = 10.0  # a step whose gradient norm is this many times its running mean is skipped; 0: none
    optimizer.ema = 0.999  # decay of the weights that sample and evaluate use; ramps up from 0 over the first steps
    optimizer.accumulate = 1  # microbatches a step; rows.count must be a multiple

    c.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that share the rows and hold all weights; -1: all that are left
    mesh.fsdp = 1  # devices that share the rows and the weights
    mesh.context = 1  # devices that share the tokens of a row, and the weights
    mesh.tensor = 1  # devices that share the heads and the hidden width of a layer
    mesh.slices = 1  # slices or pods joined by a data-centre network; the data axis runs over them
    mesh.rules = "default"  # which weights lie where: a table of vidgen/parallel/rules.py
    mesh.override = ()  # more rules, before the table's: ((path regex, (axis or None, …)), …)
    mesh.attention = "auto"  # over the context axis: auto | gather | ring | ulysses | ulysses+gather | ulysses+ring
    mesh.compiler_options = "table"  # what XLA is told for the chip, in vidgen/planning/hardware.py; none: its defaults
    mesh.ulysses = 0  # devices that exchange heads for tokens inside ulysses+…; 0: as many as the heads allow

    c.train = train = ConfigDict()
    train.steps = 10_000
    train.log_every = 10
    train.checkpoint_every = 1000
    train.checkpoint_minutes = 10.0  # and one whenever so long has passed without, kept until the next; 0: none
    train.keep = 2  # checkpoints kept, the newest of those by step
    train.keep_every = 0  # steps whose multiples are kept for good; 0: none
    train.best = ""  # figure of the held-out clips, heldout_loss say, of which the best checkpoint is kept too
    train.checkpoints = ""  # directory or gs://… that they lie in; empty: WORKDIR/checkpoints
    train.spike = 0.0  # a loss so many times its running mean, for several steps, rolls the run back; 0: never
    train.rollbacks = 3  # how often, before the run gives up
    train.recheck_every = 0  # steps between checks that hardware gives the same bits twice; 0: never
    train.hang = 600.0  # seconds without a step after which a process says who is missing, and ends; 0: never
    train.grace = 240.0  # seconds after SIGTERM within which a run has saved, or ends; launchers wait for 300
    train.eval_every = 0  # 0: never; held-out loss on a fixed grid of noise levels
    train.eval_rows = 16  # rounded up to whole steps
    train.sample_every = 0  # 0: never
    train.profile_steps = ()  # (first, last): a trace of these steps in WORKDIR/profile
    train.max_bad = 0.01  # share of unreadable clips above which the run stops
    train.wandb = ""  # project to log to, beside metrics.jsonl and TensorBoard; needs the extra [wandb]

    c.sample = sample = ConfigDict()
    sample.prompts = ()  # prompts of the samples drawn while training; empty: captions of held-out clips
    sample.frames = 17
    sample.height = 32
    sample.width = 32
    sample.fps = 8.0
    sample.solver = "euler"  # euler | heun | ddim | unipc | flow_match_euler: see vidgen/diffusion/solvers.py
    sample.steps = 24
    sample.guidance = 2.0  # classifier-free; 1: none
    sample.expert = ""  # weights of another denoiser, for the noise levels on the other side of sample.boundary
    sample.boundary = 0.0  # with two: noise level from which on the one for high noise draws (Wan 2.2: 0.875)
    sample.guidance_2 = 0.0  # of the one for low noise; 0: sample.guidance
    sample.eta = 0.0  # of ddim: share of the noise that each step draws anew
    return c.lock()


def check(c: ConfigDict) -> None:
    """Raises ConfigError for a number outside its range, naming the nearest inside, and for a credential."""
    if held := secrets.credentials(_leaves(c)):
        raise ConfigError(
            f"config.{held[0]} holds a credential, and a run keeps its config on disk; expected none: leave it to the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, WANDB_API_KEY, …)"
        )
    for key, value in _leaves(c).items():
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if isinstance(value, int | float) and not least <= value <= most:
            near = min(max(value, least), most) if value == value else least
            wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise ConfigError(f"config.{key}={value}: expected {wanted}; nearest: {near:g}")


def _leaves(c: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flat view: dotted key → value."""
    flat = {}
    for key, value in c.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def override(c: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of `c` with dotted keys set. Strings are read as Python literals where the key's type wants one.

    Raises ConfigError for an unknown key (naming the nearest) or a value of another type.
    """
    c = ConfigDict(c).copy_and_resolve_references()
    known = _leaves(c)
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            raise ConfigError(f"unknown setting config.{key}{hint}")
        *path, leaf = key.split(".")
        node = c
        for name in path:
            node = node[name]
        try:
            node[leaf] = _typed(value, known[key])
        except (TypeError, ValueError, SyntaxError):
            raise ConfigError(
                f"config.{key}={value!r}: expected {type(known[key]).__name__}, like {known[key]!r}"
            ) from None
    return c


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: what JSON gives for what a config file holds."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _typed(value: Any, like: Any) -> Any:
    """`value`, from a command line, as the type of `like`."""
    if isinstance(like, str):
        return str(value)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
        value = ast.literal_eval(value) if isinstance(value, str) else value
    if isinstance(like, bool) != isinstance(value, bool):
        raise TypeError
    if isinstance(like, tuple):
        if not isinstance(value, list | tuple):
            raise TypeError
        value = _tuples(value)
        if like and not isinstance(like[0], tuple) and any(type(v) is not type(like[0]) for v in value):
            raise TypeError
        return value
    if isinstance(like, float):
        return float(value)
    if not isinstance(value, type(like)):
        raise TypeError
    return value


def executed(path: str, flag: str) -> ModuleType:
    """The module in a Python file that `flag` of the command line names.

    Raises ConfigError if the file can't be found or read, or raises anything.
    """
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = [f for f in os.listdir(folder) if f.endswith(".py")] if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        hint = f"; did you mean {os.path.join(os.path.dirname(path), near[0])}?" if near else ""
        raise ConfigError(f"--{flag}={path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"vidgen_{flag}", path)
    if spec is None:
        raise ConfigError(f"--{flag}={path}: expected a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    with _told(f"--{flag}={path}"):
        spec.loader.exec_module(module)
    return module


def called(file: str, flag: str, function: str) -> tuple[str, Any]:
    """(path, what `function(arg)` returns) of a Python file FILE or FILE:arg; raises ConfigError as `executed` does."""
    path, _, arg = file.partition(":")
    module = executed(path, flag)
    with _told(f"--{flag}={path}"):
        return path, getattr(module, function)(arg)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turns whatever a user's file may raise into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"{where}: {type(e).__name__}: {e}") from e


def load(file: str, changes: dict[str, Any] | None = None) -> ConfigDict:
    """The config of FILE or FILE:arg, with dotted keys set to other values.

    Raises ConfigError if the file can't be found or read, has no get_config, or a change does not fit.
    """
    path, config = called(file, "config", "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config returned {type(config).__name__}; expected a ConfigDict")
    known, found = _leaves(base()).keys(), _leaves(config).keys()
    if known != found:
        key = sorted(known ^ found)[0]
        near = difflib.get_close_matches(key, known, n=1)
        what = f"unknown setting {key}{f'; did you mean {near[0]}?' if near else ''}" if key in found else f"no {key}"
        raise ConfigError(f"--config={path}: {what}; start from vidgen.config.base()")
    config = override(config, changes or {})
    check(config)
    return config


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank; raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as f:
            return [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}; expected a text file in UTF-8") from None


def to_json(c: ConfigDict) -> str:
    """The config as JSON, keys sorted, tuples as lists."""
    return json.dumps(c.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`, on top of the defaults; raises ConfigError on keys that this version does not know."""
    found = _leaves(ConfigDict(json.loads(text)))
    if isinstance(placed := found.get("model.absolute"), bool):  # what it was once
        found["model.absolute"] = "projected" if placed else "none"
    return override(base(), found)


def difference(a: ConfigDict, b: ConfigDict) -> list[str]:
    """The dotted keys in which two configs differ."""
    flat_a, flat_b = _leaves(a), _leaves(b)
    return sorted(k for k in flat_a.keys() | flat_b.keys() if flat_a.get(k) != flat_b.get(k))
