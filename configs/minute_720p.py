"""A minute in one row: 1,441 frames of 720 x 1280 at 24 a second are 361 x 45 x 80 = 1,299,600 tokens.

    vidgen plan --config configs/minute_720p.py         --topology v5p:8x8x8     windows, every fourth layer sees all
    vidgen plan --config configs/minute_720p.py:full    --topology v5p:8x8x8     all layers see the whole minute

The shape of the Wan 14B model. Windows are of 19 x 15 x 20 tokens, 19 of them in time and 12 in space, and every other
layer's are moved by half.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """`arg` "full": full attention in every layer."""
    if arg not in ("", "full"):
        raise configs.ConfigError(f"configs/minute_720p.py:{arg}: expected nothing or full")
    c = configs.base()
    c.data.moving_shapes.sizes = ((1441, 720, 1280),)
    c.data.moving_shapes.fps = 24.0
    c.tokenizer.name = "wavelet"
    c.tokenizer.patch = (1, 2, 2)

    c.rows.count = 8
    c.rows.tokens = 1_310_720
    c.rows.segments = 1
    c.rows.text = 512
    c.rows.caption = 512
    c.rows.window = 16

    c.text.width = 4096
    c.text.layers = 0
    c.text.heads = 32

    c.model.width = 5120
    c.model.layers = 40
    c.model.heads = 40
    c.model.mlp_dim = 13_824
    c.model.rope_theta = 10_000.0
    c.model.absolute = "none"
    c.model.shared_modulation = True
    c.model.text_mlp = True
    c.model.residual = "bfloat16"
    c.model.remat = "attention"
    c.model.window = () if arg == "full" else (19, 15, 20)
    c.model.full_every = 4

    c.objective.prediction = "velocity"
    c.objective.shift = 5.0

    c.optimizer.name = "adamw"
    c.optimizer.lr = 5e-5

    c.mesh.fsdp = 8
    c.mesh.context = 64

    c.sample.frames = 1441
    c.sample.height = 720
    c.sample.width = 1280
    c.sample.fps = 24.0
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
