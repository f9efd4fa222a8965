"""A small video VAE that learns eleven short clips of real footage by heart, on two CPU cores.

    bash launch/real_clips.sh runs/real          makes runs/real/shards; then
    vidgen train --config configs/vae_real_clips.py --workdir runs/vae_real --input runs/real/shards
    vidgen evaluate --workdir runs/vae_real --suite reconstruction

Clips of 17 frames of 32 x 75, 57 and 43 pixels, whole, and as far beyond their right edge as whole latents are: a step
has chunks of one of the three sizes.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """The overfitting example; takes no argument."""
    if arg:
        raise configs.ConfigError(f"configs/vae_real_clips.py takes no argument, got {arg!r}")
    c = configs.base()
    c.task = "vae"
    c.dtype = "float32"  # faster than bfloat16 on a CPU

    c.data.source = "runs/real/shards"

    c.vae.base_dim = 32
    c.vae.dim_mult = (1, 2, 2)
    c.vae.temporal_downsample = (True, True)
    c.vae.num_res_blocks = 1
    c.vae.z_dim = 16
    c.vae.residual = True
    c.vae.patch = 2
    c.vae.remat = False

    # Larger clips give chunks of the smaller sizes too.
    c.clips.shapes = ((17, 32, 80, 2), (17, 32, 64, 2), (17, 32, 48, 2))

    c.reconstruction.l1 = 1.0
    c.reconstruction.l2 = 1.0
    c.reconstruction.kl = 1e-6

    c.optimizer.lr = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.ema = 0.995

    c.train.steps = 13_000
    c.train.log_every = 50
    c.train.checkpoint_every = 1000
    c.train.eval_every = 1000
    c.train.eval_rows = 8
    c.train.sample_every = 1000
    return c
