"""Wan 2.1 I2V-14B: a clip from its first frame and a prompt, or with `:first_last` FLF2V-14B, from both its ends.

    vidgen plan --config configs/wan_i2v_14b.py --topology v5p:2x2x2 --abstract

16,394,878,784 parameters: T2V-14B's, 20 channels more a latent at the entrance (a mask of 4, and the latents of what is
given), and keys and values of their own for CLIP's features of the picture in each block (arXiv:2503.20314).
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """`arg` "first_last": with both ends given."""
    if arg not in ("", "first_last"):
        raise configs.ConfigError(f"configs/wan_i2v_14b.py:{arg}: expected nothing or first_last")
    c = configs.load(os.path.join(os.path.dirname(__file__), "wan_14b_720p.py"))
    c.model.cond = 20 * 4  # channels of a latent times latents of a token
    c.model.image_width = 1280  # of CLIP ViT-H
    c.control.channels = "wan"
    c.control.masks = (("first", 1.0),)
    if arg:
        c.model.image_tokens = 2 * 257
        c.control.masks = (("first_last", 1.0),)
        c.objective.shift = 16.0
    c.mesh.context = 8
    return c
