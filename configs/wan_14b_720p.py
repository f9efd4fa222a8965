"""The shape of Wan 2.1 14B on its longest clips: one of 81 x 720 x 1280 a row, 75,600 tokens (arXiv:2503.20314).

    vidgen plan --config configs/wan_14b_720p.py --topology v5p:2x2x1

40 layers of width 5,120, 40 heads, an MLP of 13,824, text of width 4,096 through two matrices, one modulation for all
blocks. Rows are padded to 75,776 tokens, a multiple of 512 on each of four devices.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/wan_14b_720p.py takes no argument, got {arg!r}")
    c = configs.base()
    c.data.moving_shapes.sizes = ((81, 720, 1280),)
    c.data.moving_shapes.fps = 16.0
    c.tokenizer.name = "wavelet"
    c.tokenizer.patch = (1, 2, 2)

    c.rows.count = 1
    c.rows.tokens = 75_776
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
    c.model.mlp_ratio = 2.7
    c.model.rope_theta = 10_000.0
    c.model.absolute = "none"
    c.model.shared_modulation = True
    c.model.text_mlp = True
    c.model.residual = "bfloat16"
    c.model.remat = "attention, residual=offload"

    c.objective.prediction = "velocity"
    c.objective.shift = 5.0

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-5

    c.mesh.context = 4

    c.sample.frames = 81
    c.sample.height = 720
    c.sample.width = 1280
    c.sample.fps = 16.0
    c.sample.steps = 50
    c.sample.guidance = 5.0
    return c
