"""A 10B text-to-video model on rows of 61,440 tokens: 480p and 720p clips of mixed lengths, packed.

    vidgen plan  --config configs/dit_10b_60k.py --topology v5p:4x8x8
    vidgen plan  --config configs/dit_10b_60k.py --topology h100:32x8
    vidgen train --config configs/dit_10b_60k.py --input SHARDS --workdir …

A token covers 4 frames of 16 x 16 pixels.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/dit_10b_60k.py takes no argument, got {arg!r}")
    c = configs.base()
    # The mix that a plan counts with, sizes that fill rows: 17, 1, 3, 3, 2 and 1 of them.
    c.data.moving_shapes.sizes = (
        (1, 720, 1280),
        (65, 720, 1280),
        (49, 480, 832),
        (49, 832, 480),
        (73, 480, 832),
        (153, 480, 832),
    )
    c.data.moving_shapes.fps = 16.0
    c.tokenizer.name = "wavelet"
    c.tokenizer.patch = (1, 2, 2)

    c.rows.count = 32
    c.rows.tokens = 61_440
    c.rows.segments = 17
    c.rows.text = 4352
    c.rows.caption = 256
    c.rows.window = 256

    c.text.width = 4096
    c.text.layers = 0
    c.text.heads = 32

    c.model.width = 4096
    c.model.layers = 36
    c.model.heads = 32
    c.model.rope_theta = 10_000.0
    c.model.shared_modulation = True
    c.model.residual = "bfloat16"
    c.model.remat = "products"

    c.objective.prediction = "velocity"
    c.objective.shift = 5.0
    c.objective.shift_tokens = 32_760

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-4
    c.optimizer.beta2 = 0.95
    c.optimizer.ema = 0.9999
    c.optimizer.warmup = 2000

    # Each axis one dimension of the torus of v5p:4x8x8: gathers over a ring of 8 run beside the work with any libtpu,
    # over 32 devices with recent ones only.
    c.mesh.data = 4
    c.mesh.fsdp = 8
    c.mesh.context = 8
    c.mesh.attention = "gather"  # keys travel beside the work; an exchange of heads would stand in its way

    c.train.steps = 200_000
    c.sample.frames = 81
    c.sample.height = 480
    c.sample.width = 832
    c.sample.fps = 16.0
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
