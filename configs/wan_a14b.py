"""One of Wan 2.2 A14B's two experts: T2V-14B's shape, trained on the noise levels that are its own.

    vidgen plan --config configs/wan_a14b.py:high --topology v5p:2x2x1
    vidgen plan --config configs/wan_a14b.py:low  --topology v5p:2x2x1

`high` has noise levels from 0.875 to 1, `low` those below; `high,i2v` and `low,i2v` are the image-to-video model's,
with 20 channels more a latent and a border of 0.9. Weights as in configs/wan_1_3b.py.
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs

BORDERS = {"": 0.875, "i2v": 0.9}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` high or low, and maybe i2v after a comma."""
    expert, comma, kind = arg.partition(",")
    if expert not in ("high", "low") or kind not in BORDERS or (comma and not kind):
        raise configs.ConfigError(f"configs/wan_a14b.py:{arg}: expected high or low, or high,i2v or low,i2v")
    c = configs.load(os.path.join(os.path.dirname(__file__), "wan_14b_720p.py"))
    border = BORDERS[kind]
    c.objective.time_range = (border, 1.0) if expert == "high" else (0.0, border)
    c.sample.steps = 40
    if kind:
        c.model.cond = 20 * 4  # channels of a latent times latents of a token
        c.control.channels = "wan"
        c.control.masks = (("first", 1.0),)
        c.objective.shift = 5.0
        c.sample.guidance = 3.5
    else:
        c.objective.shift = 12.0
        c.sample.guidance = 4.0 if expert == "high" else 3.0
    return c
