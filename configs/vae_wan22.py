"""The video VAE in the shape of Wan 2.2's: stride 4x16x16, 48 channels, trained from nothing on your own clips.

    vidgen ingest --input VIDEOS --output shards --size 480
    vidgen train --config configs/vae_wan22.py --workdir runs/vae_wan22 --input shards       on every host of the pod
    vidgen plan  --config configs/vae_wan22.py:81x480x832 --topology v5p:2x2x4               before it is paid for

Images first, then clips of 17 to 81 frames; L1, LPIPS and a small KL divergence first, then critics of frames and of
clips. LPIPS needs the extra [perceptual]. With an argument, FRAMESxHEIGHTxWIDTH, all chunks are of that one size.
"""

from ml_collections import ConfigDict

from vidgen import config as configs


def get_config(arg: str = "") -> ConfigDict:
    """Wan 2.2's VAE for 16 chips; the argument is one size for all chunks, such as 81x480x832."""
    c = configs.base()
    c.task = "vae"

    c.data.source = "shards"
    c.data.holdout = 0.01
    c.data.threads = 32

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
    if arg:
        c.clips.shapes = ((*size_of(arg), 4),)
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


def size_of(arg: str) -> tuple[int, int, int]:
    """(frames, height, width) of such as 81x480x832."""
    parts = arg.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise configs.ConfigError(f"configs/vae_wan22.py:{arg}: expected FRAMESxHEIGHTxWIDTH, such as 81x480x832")
    return tuple(map(int, parts))
