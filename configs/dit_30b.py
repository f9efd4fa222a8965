"""A 30B model on 32 rows of 131,072 tokens: up to half a minute at 480p, or ten seconds at 720p, in a row.

vidgen plan --config configs/dit_30b.py --topology v6e:16x16
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/dit_30b.py takes no argument, got {arg!r}")
    c = configs.base()
    # The mix that a plan counts with, sizes that fill rows: 36, 1, 2, 1, 2 and 4 of them.
    c.data.moving_shapes.sizes = (
        (1, 720, 1280),
        (141, 720, 1280),
        (69, 720, 1280),
        (333, 480, 832),
        (165, 480, 832),
        (81, 480, 832),
    )
    c.data.moving_shapes.fps = 16.0
    c.tokenizer.name = "wavelet"
    c.tokenizer.patch = (1, 2, 2)

    c.rows.count = 32
    c.rows.tokens = 131_072
    c.rows.segments = 36
    c.rows.text = 9216
    c.rows.caption = 256
    c.rows.window = 256

    c.text.width = 4096
    c.text.layers = 0
    c.text.heads = 32

    c.model.width = 6144
    c.model.layers = 52
    c.model.heads = 48
    c.model.rope_theta = 10_000.0
    c.model.shared_modulation = True
    c.model.residual = "bfloat16"
    c.model.remat = "full"

    c.objective.prediction = "velocity"
    c.objective.shift = 7.0
    c.objective.shift_tokens = 32_760

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-4
    c.optimizer.beta2 = 0.95
    c.optimizer.ema = 0.9999
    c.optimizer.warmup = 2000

    c.mesh.fsdp = 32  # one row a device at a time: the keys of two don't fit
    c.mesh.context = 8
    c.mesh.attention = "gather"  # keys travel beside the work; an exchange of heads would stand in its way

    c.train.steps = 200_000
    c.sample.frames = 129
    c.sample.height = 720
    c.sample.width = 1280
    c.sample.fps = 16.0
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
