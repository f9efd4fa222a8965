"""The quickstart's task, and beside it: clips from their first frame, from first to last, and on from a clip.

    vidgen train --config configs/first_frame.py --workdir runs/first_frame
    vidgen evaluate --workdir runs/first_frame --suite first_frame
    vidgen sample --workdir runs/first_frame --first_frame frame.png --prompt "a red circle moving right" --output a.mp4
    vidgen sample --workdir runs/first_frame --extend clip.mp4 --frames 17 --output b.mp4

Of four clips in ten the first frame is given, of one the first and the last, of one a stretch, and of four nothing, so
that it draws from prompts alone as well. `:wan` tells the model of it as Wan 2.1 I2V is told: by mask channels and
latents beside the noisy ones, and not by noise level 0.
"""

import os

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """`arg` "wan": Wan's mask channels instead of known tokens."""
    if arg not in ("", "wan"):
        raise configs.ConfigError(f"configs/first_frame.py:{arg}: expected nothing or wan")
    c = configs.load(os.path.join(os.path.dirname(__file__), "quickstart.py"))
    c.control.masks = (("first", 0.4), ("first_last", 0.1), ("extend", 0.1))
    if arg == "wan":
        c.control.channels = "wan"
        c.model.cond = c.tokenizer.stride[0] * (1 + 3 * c.tokenizer.stride[1] * c.tokenizer.stride[2])
    c.train.steps = 1500
    c.train.checkpoint_every = 500
    c.train.eval_every = 500
    c.train.sample_every = 500
    return c
