"""Wan 2.2 TI2V-5B: 4,999,787,712 parameters, on clips of 121 x 704 x 1280 at 24 a second, 27,280 tokens.

    vidgen plan --config configs/wan_ti2v_5b.py --topology v5p:2x2x1

A latent of Wan 2.2's VAE covers 4 x 16 x 16 pixels with 48 channels. A first frame is given as known latents at noise
level 0. Weights as in configs/wan_1_3b.py.
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/wan_ti2v_5b.py takes no argument, got {arg!r}")
    c = configs.load(os.path.join(os.path.dirname(__file__), "wan_1_3b.py"))
    c.data.moving_shapes.sizes = ((121, 704, 1280),)
    c.data.moving_shapes.fps = 24.0

    c.vae.base_dim = 160
    c.vae.decoder_base_dim = 256
    c.vae.z_dim = 48
    c.vae.residual = True
    c.vae.patch = 2

    c.rows.tokens = 27_648

    c.model.width = 3072
    c.model.layers = 30
    c.model.heads = 24
    c.model.mlp_dim = 14_336

    c.control.masks = (("first", 0.5),)

    c.objective.shift = 5.0

    c.sample.frames = 121
    c.sample.height = 704
    c.sample.width = 1280
    c.sample.fps = 24.0
    return c
