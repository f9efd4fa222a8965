"""A small video VAE of stride 4x8x8 for moving shapes, trained from nothing in half an hour on two CPU cores.

vidgen train --config configs/vae_moving_shapes.py --workdir runs/vae_moving_shapes
vidgen evaluate --workdir runs/vae_moving_shapes --suite reconstruction

Its latents are what configs with `tokenizer.name = "vae"` and `tokenizer.weights = "runs/vae_moving_shapes"` train on.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """The small VAE; takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/vae_moving_shapes.py takes no argument, got {arg!r}")
    c = configs.base()
    c.task = "vae"
    c.dtype = "float32"  # faster than bfloat16 on a CPU

    c.data.moving_shapes.level = "easy"
    c.data.moving_shapes.sizes = ((9, 32, 32),)

    # Wan 2.2's kind of levels, three of them, on pixels folded 2 x 2.
    c.vae.base_dim = 24
    c.vae.dim_mult = (1, 2, 2)
    c.vae.temporal_downsample = (True, True)
    c.vae.num_res_blocks = 1
    c.vae.z_dim = 16
    c.vae.residual = True
    c.vae.patch = 2
    c.vae.remat = False

    c.clips.shapes = ((9, 32, 32, 8),)

    # With L1 alone a small object on a black ground is long taken for black.
    c.reconstruction.l1 = 1.0
    c.reconstruction.l2 = 1.0
    c.reconstruction.kl = 1e-6

    c.optimizer.lr = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.ema = 0.995

    c.train.steps = 7000
    c.train.log_every = 50
    c.train.checkpoint_every = 1000
    c.train.eval_every = 500
    c.train.eval_rows = 64
    c.train.sample_every = 1000
    return c
