"""All of moving shapes, at mixed durations, sizes and aspect ratios, captioned in English and Chinese.

    vidgen train --config configs/moving_shapes.py --workdir runs/shapes
    vidgen evaluate --workdir runs/shapes --suite moving_shapes

One to three objects, seven shapes, eight colours, twelve motions, moving cameras, occlusion, collisions, two shots:
hours of training, on an accelerator. The first lines that train prints say how well the rows are filled and balanced.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """`arg` "cpu": float32, as a CPU likes it."""
    if arg not in ("", "cpu"):
        raise configs.ConfigError(f"configs/moving_shapes.py:{arg}: expected nothing or cpu")
    c = configs.base()
    c.dtype = "float32" if arg == "cpu" else "bfloat16"

    shapes = c.data.moving_shapes
    shapes.level = "full"
    shapes.languages = ("en", "zh")
    shapes.sizes = (
        (1, 64, 64),
        (1, 48, 80),
        (9, 64, 64),
        (17, 48, 64),
        (17, 64, 48),
        (17, 40, 72),
        (25, 48, 48),
        (33, 32, 32),
        (33, 56, 40),
        (49, 32, 48),
    )

    c.rows.count = 16
    c.rows.tokens = 2048
    c.rows.segments = 32
    c.rows.text = 4096
    c.rows.caption = 256

    c.model.width = 512
    c.model.layers = 12
    c.model.heads = 8

    # Larger clips say the same more often, so more noise hides as much of them.
    c.objective.shift = 4.0
    c.objective.shift_tokens = 256

    c.train.steps = 50_000
    c.train.eval_every = 1000
    c.train.sample_every = 2500

    c.sample.frames = 17
    c.sample.height = 48
    c.sample.width = 64
    c.sample.guidance = 3.0
    return c
