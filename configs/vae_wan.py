"""The video VAEs in the shapes of Wan 2.1 and Wan 2.2, trained from nothing on your own clips.

    vidgen ingest --input VIDEOS --output shards --size 480
    vidgen train --config configs/vae_wan.py:2.1 --workdir runs/vae --input shards           on every host of the pod
    vidgen plan  --config configs/vae_wan.py:2.1,81x480x832 --topology v5p:2x2x4             before it is paid for

2.1: stride 4x8x8, 16 channels; 2.2: stride 4x16x16, 48 channels. With a size, FRAMESxHEIGHTxWIDTH, all chunks are of
that one size; else images come first, then clips of 17 to 81 frames. L1, LPIPS and a small KL divergence first, then
critics of frames and of clips. LPIPS needs the extra [perceptual].
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "2.1") -> ConfigDict:
    """For 16 chips; `arg` is 2.1 or 2.2, and after a comma one size for all chunks, such as 81x480x832."""
    version, _, size = (arg or "2.1").partition(",")
    if version not in ("2.1", "2.2"):
        raise configs.ConfigError(f"configs/vae_wan.py:{arg}: expected 2.1 or 2.2, and maybe a size: 2.1,81x480x832")
    c = configs.base()
    c.task = "vae"

    c.data.source = "shards"
    c.data.holdout = 0.01
    c.data.threads = 32

    # c.vae is Wan 2.1's by default: base_dim 96, dim_mult (1, 2, 4, 4), two residual blocks a level.
    if version == "2.2":
        # Pixels are folded 2 x 2 first, and each level has a shortcut without parameters around it.
        c.vae.base_dim = 160
        c.vae.decoder_base_dim = 256
        c.vae.z_dim = 48
        c.vae.residual = True
        c.vae.patch = 2

    # Steps of about as many pixels each. Rows lie over data, the height of each over context.
    c.clips.shapes = ((1, 256, 256, 128), (17, 256, 256, 16), (33, 256, 256, 8), (81, 256, 256, 4), (17, 480, 832, 4))
    c.clips.weights = (0.1, 0.4, 0.2, 0.1, 0.2)
    c.clips.image_steps = 20_000
    c.mesh.data = 4
    c.mesh.context = -1
    if size:
        c.clips.shapes = ((*size_of(size), 4),)
        c.clips.weights = ()
        c.clips.image_steps = 0

    c.reconstruction.l1 = 1.0
    c.reconstruction.lpips = 1.0
    c.reconstruction.kl = 1e-6
    c.reconstruction.gan = 0.5
    c.reconstruction.gan_start = 100_000

    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-4
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 1000
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.95

    c.train.steps = 200_000
    c.train.log_every = 100
    c.train.checkpoint_every = 2000
    c.train.eval_every = 5000
    c.train.eval_rows = 64
    c.train.sample_every = 10_000
    return c


def size_of(text: str) -> tuple[int, int, int]:
    """(frames, height, width) of such as 81x480x832."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise configs.ConfigError(f"configs/vae_wan.py: {text!r}: expected FRAMESxHEIGHTxWIDTH, such as 81x480x832")
    return tuple(map(int, parts))
