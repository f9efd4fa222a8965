"""Eleven short clips of real footage, learned by heart: the path of real video, end to end, on two CPU cores.

    bash launch/real_clips.sh runs/real          or, when the footage is in place, step by step:
    vidgen ingest --input runs/real/captions.csv --output runs/real/shards --frames 17 --size 32
    vidgen train --config configs/real_clips.py --workdir runs/real/run --input runs/real/shards
    vidgen evaluate --workdir runs/real/run --suite memorised

Clips of three aspect ratios and two frame rates share rows. For footage of your own, start from here: more clips want
more steps, a larger model, and `data.holdout` for a held-out loss.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """The overfitting example; takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/real_clips.py takes no argument, got {arg!r}")
    c = configs.base()
    c.dtype = "float32"  # faster than bfloat16 on a CPU

    c.data.source = "runs/real/shards"

    # 17 frames of 32 x 72, 56 and 40 pixels are 180, 140 and 100 tokens.
    c.rows.count = 4
    c.rows.tokens = 560
    c.rows.segments = 8
    c.rows.text = 384
    c.rows.caption = 64

    c.tokenizer.name = "wavelet"
    c.tokenizer.stride = (4, 8, 8)
    c.tokenizer.mean = 0.0
    c.tokenizer.std = 0.5

    c.text.width = 128
    c.text.layers = 1

    c.model.width = 256
    c.model.layers = 4
    c.model.heads = 4
    c.model.remat = "none"
    c.model.unroll = 4

    c.objective.shift = 3.0
    c.objective.caption_dropout = 0.0  # nothing to guide away from: every clip is to be known by its caption

    c.optimizer.lr = 2e-3
    c.optimizer.ema = 0.99

    c.train.steps = 800
    c.train.log_every = 20
    c.train.checkpoint_every = 400
    c.train.sample_every = 400

    c.sample.frames = 17
    c.sample.height = 32
    c.sample.width = 72
    c.sample.fps = 25.0
    c.sample.guidance = 1.0
    return c
