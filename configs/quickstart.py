"""A small model that follows prompts, trained from nothing in minutes on two CPU cores.

bash launch/quickstart.sh            or, step by step:
vidgen train --config configs/quickstart.py --workdir runs/quickstart
vidgen sample --workdir runs/quickstart --prompt "a red circle moving right" --output sample.mp4
vidgen evaluate --workdir runs/quickstart --suite moving_shapes
vidgen report --workdir runs/quickstart

`:latents` is the same task on the latents of a VAE, four times fewer tokens a clip:

vidgen train --config configs/vae_moving_shapes.py --workdir runs/vae_moving_shapes
vidgen encode --config configs/quickstart.py:latents --output runs/latents
vidgen train --config configs/quickstart.py:latents --workdir runs/quickstart_latents --config.data.latents=runs/latents
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """`arg` "latents": on the latents of `configs/vae_moving_shapes.py`'s VAE instead of pixels."""
    if arg not in ("", "latents"):
        raise configs.ConfigError(f"configs/quickstart.py:{arg}: expected nothing or latents")
    c = configs.base()
    c.dtype = "float32"  # faster than bfloat16 on a CPU

    c.data.moving_shapes.level = "easy"
    c.data.moving_shapes.sizes = ((9, 32, 32),)

    # One clip of 3 x 4 x 4 tokens is 48 tokens.
    c.rows.count = 8
    c.rows.tokens = 192
    c.rows.segments = 4
    c.rows.text = 168
    c.rows.caption = 128  # longer than any caption here, so that prompts may be

    c.tokenizer.name = "patch"
    c.tokenizer.stride = (4, 8, 8)
    c.tokenizer.mean = -0.8  # the ground is black, -1
    c.tokenizer.std = 0.5

    c.text.width = 128
    c.text.layers = 1

    c.model.width = 192
    c.model.layers = 4
    c.model.heads = 4
    c.model.remat = "none"
    c.model.unroll = 4

    # Where things are and where they go is decided at high noise, and patches of 8 x 8 pixels say it 768 times.
    c.objective.shift = 4.0
    c.objective.time_min = 0.1

    c.optimizer.lr = 2e-3
    c.optimizer.ema = 0.99

    c.train.steps = 1000
    c.train.log_every = 20
    c.train.checkpoint_every = 250
    c.train.keep = 4
    c.train.eval_every = 250
    c.train.eval_rows = 16
    c.train.sample_every = 250

    c.sample.frames = 9
    c.sample.guidance = 2.0
    if arg == "latents":
        learned(c)
    return c


def learned(c: ConfigDict) -> None:
    """Latents instead of patches: a clip is 3 x 2 x 2 tokens of 2 x 2 latents."""
    c.data.moving_shapes.clips = 8_192  # encoded once; each pass shows the same

    c.tokenizer.name = "vae"
    c.tokenizer.weights = "runs/vae_moving_shapes"
    c.tokenizer.patch = (1, 2, 2)

    c.rows.tokens = 48

    # A step takes half the time; latents are learned later than pixels, and want no guidance on this task.
    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.eval_every = 500
    c.train.sample_every = 500
    c.sample.guidance = 1.0
