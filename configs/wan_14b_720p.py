"""Wan 2.1 T2V-14B on its longest clips: 14,288,491,584 parameters, one clip of 81 x 720 x 1280 a row, 75,600 tokens.

    vidgen plan --config configs/wan_14b_720p.py --topology v5p:2x2x1

arXiv:2503.20314. Rows are padded to 75,776 tokens, a multiple of 512 on each of four devices. Weights as in
configs/wan_1_3b.py.
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/wan_14b_720p.py takes no argument, got {arg!r}")
    c = configs.load(os.path.join(os.path.dirname(__file__), "wan_1_3b.py"))
    c.data.moving_shapes.sizes = ((81, 720, 1280),)

    c.rows.count = 1
    c.rows.tokens = 75_776

    c.model.width = 5120
    c.model.layers = 40
    c.model.heads = 40
    c.model.mlp_dim = 13_824
    c.model.remat = "attention, residual=offload"

    c.objective.shift = 5.0

    c.mesh.fsdp = 1
    c.mesh.context = 4

    c.sample.height = 720
    c.sample.width = 1280
    return c
