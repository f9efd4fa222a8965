"""Fine-tunes an imported pipeline, all of its denoiser or low-rank updates of it, on your own clips or on the
procedural ones.

    vidgen import --format diffusers Wan2.1-T2V-1.3B-Diffusers --output wan
    vidgen ingest --input videos --output clips --frames 33 --height 480 --width 832 --fps 16
    vidgen train --config configs/finetune.py:wan,lora,33x480x832 --workdir runs/a --input clips
    vidgen sample --workdir runs/a --prompt "a red circle moving right" --output a.mp4
    vidgen export runs/a --output a-lora                       the updates alone, for load_lora_weights
    vidgen export runs/a --merge --output a-pipeline           a whole pipeline, for from_pretrained

The argument is the directory of the import, and behind commas what else is wanted: `lora` (rank 32) instead of all
weights; FRAMESxHEIGHTxWIDTH, the size of the clips, which a row has room for one of and samples are drawn at, instead
of the size that the pipeline was made for; of a pipeline with two experts, `low` for the one at low noise instead of
the one at high noise. Clips are trained on as large as they are stored, and longer ones cut to the room of a row.
Without `--input` they are the procedural ones. Noise levels have the shift of the pipeline's scheduler.
"""

import re

from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.interop import pipelines
from vidgen.tokenizers.base import geometry_from_config

KNOWN = ("lora", "low")
SIZE = r"[1-9]\d*x[1-9]\d*x[1-9]\d*"


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: DIRECTORY[,lora][,low][,FRAMESxHEIGHTxWIDTH]."""
    directory, *wanted = arg.split(",")
    if not directory:
        raise ConfigError("configs/finetune.py: expected a directory of vidgen import: configs/finetune.py:DIR[,lora]")
    if odd := [word for word in wanted if word not in KNOWN and not re.fullmatch(SIZE, word)]:
        known = f"{', '.join(KNOWN)}, and a size FRAMESxHEIGHTxWIDTH such as 33x480x832"
        raise ConfigError(f"configs/finetune.py:{arg}: {odd[0]!r}: known are {known}")
    if not pipelines.is_imported(directory):
        raise ConfigError(f"configs/finetune.py:{arg}: {directory} is no imported pipeline; see vidgen import")
    c = pipelines.read_config(directory)

    if c.sample.expert:
        c.objective.time_range = (c.sample.boundary, 1.0)
        if "low" in wanted:
            c.objective.time_range = (0.0, c.sample.boundary)
            c.model.weights, c.sample.expert = c.sample.expert, c.model.weights
    elif "low" in wanted:
        raise ConfigError(f"configs/finetune.py:{arg}: low: {directory} has one denoiser; leave it out")

    for word in wanted:
        if word not in KNOWN:
            size = tuple(map(int, word.split("x")))
            c.sample.frames, c.sample.height, c.sample.width = size
            c.data.moving_shapes.sizes = (size,)
            geometry = geometry_from_config(c.tokenizer)
            tokens = geometry.tokens(*geometry.cover(*size))
            c.rows.tokens = -(-tokens // 128) * 128

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-5
    c.optimizer.warmup = 100
    c.optimizer.schedule = "constant"
    c.optimizer.weight_decay = 0.01
    c.optimizer.ema = 0.99
    if "lora" in wanted:
        c.lora.rank = 32
        c.lora.alpha = 32.0
        c.optimizer.lr = 1e-4
        c.optimizer.weight_decay = 0.0

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.log_every = 10
    return c
